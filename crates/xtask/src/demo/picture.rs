//! The loss curve as a PNG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

use super::curve::Curve;

const SIZE: (u32, u32) = (1280, 720);
const FONT: &str = "dejavu";
const INK: RGBColor = RGBColor(38, 43, 51);
const GRID: RGBColor = RGBColor(232, 235, 239);
const TRAIN: RGBColor = RGBColor(37, 99, 175);
const TRAIN_RAW: RGBColor = RGBColor(190, 209, 232);
const VALIDATION: RGBColor = RGBColor(222, 120, 31);
const ENTROPY: RGBColor = RGBColor(110, 118, 129);
const KILL: RGBColor = RGBColor(190, 38, 51);

/// Draws `curve` to `file`.
///
/// # Errors
/// If the file cannot be written.
pub(crate) fn draw(curve: &Curve, title: &str, subtitle: &str, file: &Path) -> Result<()> {
    // The font is part of this program, so that the picture looks the same on a machine without any.
    register_font(FONT, FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| anyhow!("the built-in font cannot be read"))?;
    let root = BitMapBackend::new(file, SIZE).into_drawing_area();
    draw_on(&root, curve, title, subtitle)
        .and_then(|()| root.present().map_err(|error| error.to_string()))
        .map_err(|error| anyhow!("cannot draw {}: {error}", file.display()))
}

fn draw_on(
    root: &DrawingArea<BitMapBackend<'_>, Shift>,
    curve: &Curve,
    title: &str,
    subtitle: &str,
) -> Result<(), String> {
    let text = |size: u32, colour: RGBColor| (FONT, size).into_font().color(&colour);
    root.fill(&WHITE).map_err(|error| error.to_string())?;
    let (head, body) = root.split_vertically(92);
    head.draw(&Text::new(title, (28, 22), text(28, INK)))
        .map_err(|error| error.to_string())?;
    head.draw(&Text::new(subtitle, (28, 60), text(18, ENTROPY)))
        .map_err(|error| error.to_string())?;

    let (low, high) = curve.range();
    let last = curve.steps().max(1);
    let mut chart = ChartBuilder::on(&body)
        .margin(12)
        .margin_right(36)
        .x_label_area_size(58)
        .y_label_area_size(74)
        .build_cartesian_2d(0..last, low..high)
        .map_err(|error| error.to_string())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(ENTROPY)
        .x_desc("step")
        .y_desc("loss, nats per token")
        .axis_desc_style(text(18, INK))
        .label_style(text(16, INK))
        .y_label_formatter(&|loss| format!("{loss:.1}"))
        .draw()
        .map_err(|error| error.to_string())?;

    // Back to front: single steps, their mean, what was held out, the reference line, the kills.
    let raw = LineSeries::new(curve.train.iter().copied(), TRAIN_RAW.stroke_width(1));
    chart.draw_series(raw).map_err(|error| error.to_string())?;
    chart
        .draw_series(LineSeries::new(curve.smooth(), TRAIN.stroke_width(3)))
        .map_err(|error| error.to_string())?
        .label("training loss (thin: single steps)")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 26, y)], TRAIN.stroke_width(3)));
    if !curve.validation.is_empty() {
        let held_out =
            LineSeries::new(curve.validation.iter().copied(), VALIDATION.stroke_width(2));
        chart
            .draw_series(held_out.point_size(4))
            .map_err(|error| error.to_string())?
            .label("loss on held-out text")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 26, y)], VALIDATION.stroke_width(3)));
    }
    let entropy = [(0, curve.unigram_entropy), (last, curve.unigram_entropy)];
    chart
        .draw_series(DashedLineSeries::new(
            entropy,
            9,
            6,
            ENTROPY.stroke_width(2),
        ))
        .map_err(|error| error.to_string())?
        .label(format!(
            "unigram entropy of the text: {:.2}",
            curve.unigram_entropy
        ))
        .legend(|(x, y)| PathElement::new([(x, y), (x + 26, y)], ENTROPY.stroke_width(2)));
    for (index, (step, name)) in curve.kills.iter().enumerate() {
        let line = DashedLineSeries::new([(*step, low), (*step, high)], 4, 4, KILL.stroke_width(2));
        let drawn = chart.draw_series(line).map_err(|error| error.to_string())?;
        if index == 0 {
            drawn
                .label("SIGKILL")
                .legend(|(x, y)| PathElement::new([(x, y), (x + 26, y)], KILL.stroke_width(2)));
        }
        // One below the other, so that kills close together stay readable, and above the curve's tail.
        let (x, y) = chart.backend_coord(&(*step, low));
        let place = (x + 7, y - 40 - 24 * i32::try_from(index % 4).unwrap_or(0));
        root.draw(&Text::new(name.clone(), place, text(16, KILL)))
            .map_err(|error| error.to_string())?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.92))
        .border_style(GRID)
        .legend_area_size(34)
        .margin(14)
        .label_font(text(17, INK))
        .draw()
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_drawn_without_fonts_of_the_system() {
        let file = std::env::temp_dir().join(format!("xtask-picture-{}.png", std::process::id()));
        let curve = super::super::curve::tests::example();
        draw(
            &curve,
            "Two processes killed, not one bit changed",
            "600 steps on local-cluster.toml",
            &file,
        )
        .unwrap();
        let bytes = std::fs::read(&file).unwrap();
        assert_eq!(&bytes[1..4], b"PNG");
        assert!(
            bytes.len() > 20_000,
            "{} bytes hold no picture",
            bytes.len()
        );
        std::fs::remove_file(&file).unwrap();
    }
}
