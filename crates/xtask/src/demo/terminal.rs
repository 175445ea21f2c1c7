//! The loss curve in letters, for a terminal.

use super::curve::Curve;

const COLUMNS: usize = 68;
const ROWS: usize = 16;

/// Draws `curve`: `*` training loss, `o` held-out loss, `-` unigram entropy, `|` a kill.
pub(crate) fn draw(curve: &Curve) -> String {
    let (low, high) = curve.range();
    let last = curve.steps().max(1);
    let column = |step: u64| (step as usize * (COLUMNS - 1)) / last as usize;
    let row = |loss: f64| {
        let share = ((high - loss) / (high - low)).clamp(0.0, 1.0);
        (share * (ROWS - 1) as f64).round() as usize
    };
    let mut grid = vec![vec![' '; COLUMNS]; ROWS];
    grid[row(curve.unigram_entropy)].fill('-');
    for (step, _) in &curve.kills {
        let column = column((*step).min(last));
        grid.iter_mut().for_each(|line| line[column] = '|');
    }
    for (step, loss) in curve
        .smooth()
        .into_iter()
        .filter(|(_, loss)| loss.is_finite())
    {
        grid[row(loss)][column(step)] = '*';
    }
    for (step, loss) in curve.validation.iter().filter(|(_, loss)| loss.is_finite()) {
        grid[row(*loss)][column((*step).min(last))] = 'o';
    }
    let mut text = String::new();
    for (index, line) in grid.iter().enumerate() {
        let loss = high - (high - low) * index as f64 / (ROWS - 1) as f64;
        let label = if index % 3 == 0 {
            format!("{loss:6.2}")
        } else {
            " ".repeat(6)
        };
        text.push_str(&format!(
            "{label} |{}\n",
            line.iter().collect::<String>().trim_end()
        ));
    }
    text.push_str(&format!("       +{}\n", "-".repeat(COLUMNS)));
    text.push_str(&format!(
        "        {:<width$}{last}\n",
        0,
        width = COLUMNS.saturating_sub(last.to_string().len())
    ));
    text.push_str("        * training loss   o held-out loss   - unigram entropy   | SIGKILL\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_in_the_picture() {
        let text = draw(&super::super::curve::tests::example());
        assert_eq!(text.lines().count(), ROWS + 3);
        for mark in ['*', 'o', '-', '|'] {
            assert!(text.contains(mark), "{mark} is missing in\n{text}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS + 9));
        // Both kills stand in the columns of their steps.
        let first = text.lines().next().unwrap();
        assert_eq!(
            first.chars().filter(|character| *character == '|').count(),
            3,
            "{first}"
        );
    }

    #[test]
    fn a_run_without_steps_draws_nothing_but_axes() {
        assert!(
            draw(&Curve::default()).contains("step")
                || draw(&Curve::default()).contains("training loss")
        );
    }
}
