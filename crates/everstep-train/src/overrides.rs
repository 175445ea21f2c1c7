//! `--set a.b=c`: changes to a run file before it is understood.

use toml::{Table, Value};

use crate::error::RunFileError;

/// Applies overrides in their order. The value is TOML (`3`, `true`, `[1, 2]`, `"text"`); what is not TOML is a string.
pub(crate) fn apply(table: &mut Table, overrides: &[String]) -> Result<(), RunFileError> {
    overrides.iter().try_for_each(|given| {
        set(table, given).map_err(|reason| RunFileError::Override {
            given: given.clone(),
            reason,
        })
    })
}

fn set(table: &mut Table, given: &str) -> Result<(), String> {
    const FORM: &str = "allowed: section.field=value, such as run.steps=100";
    let (path, value) = given
        .split_once('=')
        .ok_or_else(|| format!("has no `=`; {FORM}"))?;
    let keys: Vec<&str> = path.trim().split('.').collect();
    if keys.len() < 2 || keys.iter().any(|key| key.trim().is_empty()) {
        return Err(format!("`{path}` is not a field; {FORM}"));
    }
    let (last, sections) = keys.split_last().ok_or(FORM)?;
    let mut at = table;
    for section in sections {
        let entry = at
            .entry(section.trim())
            .or_insert_with(|| Value::Table(Table::new()));
        at = entry
            .as_table_mut()
            .ok_or_else(|| format!("`{}` is not a section; {FORM}", section.trim()))?;
    }
    at.insert(last.trim().to_owned(), parse(value.trim()));
    Ok(())
}

fn parse(text: &str) -> Value {
    match toml::from_str::<Table>(&format!("value = {text}")) {
        // A line break could smuggle in a second field.
        Ok(mut parsed) if parsed.len() == 1 => parsed
            .remove("value")
            .unwrap_or_else(|| Value::String(text.into())),
        _ => Value::String(text.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn values_are_toml_or_text() {
        let mut changed = table("[run]\nsteps = 1\nname = \"a\"\n");
        let overrides = [
            "run.steps=20",
            "run.name = b=c",
            "data.train=[\"x y\", \"z\"]",
            "optimizer.lr=1e-3",
            "run.store=file:///tmp/x",
            "data.tokenizer.kind=char",
            "model.bias=false",
            "run.note=1\nsteps = 9",
        ];
        apply(&mut changed, &overrides.map(str::to_owned)).unwrap();
        let expected = "[run]\nsteps = 20\nname = \"b=c\"\nstore = \"file:///tmp/x\"\nnote = \"1\\nsteps = 9\"\n\
             [data]\ntrain = [\"x y\", \"z\"]\ntokenizer.kind = \"char\"\n[optimizer]\nlr = 1e-3\n[model]\nbias = false\n";
        assert_eq!(changed, table(expected));
    }

    #[test]
    fn what_is_no_override_is_named() {
        let mut unchanged = table("[run]\nsteps = 1\n");
        for (given, part) in [
            ("run.steps", "has no `=`"),
            ("steps=3", "`steps` is not a field"),
            ("run..steps=3", "`run..steps` is not a field"),
            ("run.steps.x=3", "`steps` is not a section"),
        ] {
            let error = apply(&mut unchanged, &[given.to_owned()])
                .unwrap_err()
                .to_string();
            assert!(
                error.starts_with(&format!("--set {given}: {part}")),
                "{error}"
            );
            assert!(error.contains("allowed: section.field=value"), "{error}");
        }
        assert_eq!(unchanged, table("[run]\nsteps = 1\n"));
    }
}
