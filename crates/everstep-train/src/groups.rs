//! `[[optimizer.group]]`: which parameters a group names.

use everstep_optim::{GroupConfig, ParameterSpec, Update};
use everstep_spec::ModelConfig;
use glob::Pattern;

/// Puts each parameter in the first group that names it. Biases of routers are moved by no gradient, and stay outside.
pub(crate) fn assign(groups: &[GroupConfig], parameters: &mut [ParameterSpec]) {
    // What is no pattern was refused before.
    let pattern = |text: &String| Pattern::new(text).ok();
    let patterns: Vec<Vec<Pattern>> = groups
        .iter()
        .map(|group| group.parameters.iter().filter_map(pattern).collect())
        .collect();
    for parameter in parameters {
        let names = |(_, patterns): &(u8, &Vec<Pattern>)| {
            patterns.iter().any(|it| it.matches(&parameter.name))
        };
        let is_moved = !matches!(parameter.update, Update::Balance { .. });
        let group = (1..=u8::MAX)
            .zip(&patterns)
            .find(names)
            .filter(|_| is_moved);
        parameter.group = group.map_or(0, |(number, _)| number);
    }
}

/// What is wrong with the patterns of the groups, if anything.
pub(crate) fn check(groups: &[GroupConfig], model: &ModelConfig) -> Result<(), String> {
    if groups.is_empty() {
        // A large model has tens of thousands of names.
        return Ok(());
    }
    let parameters = everstep_spec::parameters(model);
    let patterns = groups.iter().flat_map(|group| &group.parameters);
    for text in patterns {
        let pattern = Pattern::new(text).map_err(|error| {
            let reason = error.msg;
            format!("has {text:?}, which is no pattern ({reason}); allowed: names, with `*` for anything")
        })?;
        if parameters.iter().any(|it| pattern.matches(&it.name)) {
            continue;
        }
        let example = parameters.last().map_or("", |it| &it.name);
        return Err(format!(
            "has {text:?}, which is none of the model's parameters; allowed: names such as {example:?}, with `*` for anything"
        ));
    }
    Ok(())
}
