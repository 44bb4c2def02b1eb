//! The experiment as a picture: how fast each schedule adapts, and what each way learns and forgets.

use std::path::Path;

use anyhow::Result;
use plotters::{coord::Shift, prelude::*};

use super::{Perplexity, Way};

const SIZE: (u32, u32) = (1100, 480);
const FONT: &str = "sans-serif";

fn colour(way: Way) -> RGBColor {
    if way.rewarm { RGBColor(200, 60, 40) } else { RGBColor(40, 90, 180) }
}

/// Draws `path`, an SVG. `curves` are held-out losses on the new text by step.
pub(super) fn draw(
    path: &Path,
    before: Perplexity,
    results: &[(Way, Perplexity)],
    curves: &[(Way, Vec<(f64, f64)>)],
) -> Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(SIZE.0 / 2);
    adaptation(&left, curves)?;
    forgetting(&right, before, results)?;
    area.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A range that holds all values, with some room.
fn range(values: impl Iterator<Item = f64> + Clone) -> std::ops::Range<f64> {
    let least = values.clone().fold(f64::INFINITY, f64::min);
    let most = values.fold(f64::NEG_INFINITY, f64::max);
    let room = 0.08 * (most - least).max(1e-3);
    least - room..most + room
}

fn adaptation(area: &Area<'_>, curves: &[(Way, Vec<(f64, f64)>)]) -> Result<()> {
    let points = || curves.iter().flat_map(|(_, curve)| curve.iter().copied());
    let (steps, losses) = (range(points().map(|point| point.0)), range(points().map(|point| point.1)));
    let mut chart = ChartBuilder::on(area)
        .caption("Held-out loss on the new text, no replay", (FONT, 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(52)
        .build_cartesian_2d(steps, losses)?;
    chart.configure_mesh().x_desc("steps on the new text").y_desc("nats per byte").draw()?;
    for (way, curve) in curves {
        let style = colour(*way).stroke_width(2);
        chart
            .draw_series(LineSeries::new(curve.iter().copied(), style))?
            .label(way.schedule())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
    }
    chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
    Ok(())
}

fn forgetting(area: &Area<'_>, before: Perplexity, results: &[(Way, Perplexity)]) -> Result<()> {
    let all = || results.iter().map(|(_, perplexity)| *perplexity);
    let new = range(all().map(|perplexity| perplexity.new));
    let old = range(all().map(|perplexity| perplexity.old).chain([before.old]));
    let mut chart = ChartBuilder::on(area)
        .caption("What is learnt and what is forgotten, by replay", (FONT, 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(52)
        .build_cartesian_2d(new.clone(), old)?;
    chart
        .configure_mesh()
        .x_desc("perplexity on the new text (left is better)")
        .y_desc("perplexity on the old text (low is better)")
        .draw()?;
    chart
        .draw_series(LineSeries::new([(new.start, before.old), (new.end, before.old)], BLACK.mix(0.5)))?
        .label("old text, before")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], BLACK.mix(0.5)));
    for rewarm in [false, true] {
        let ways: Vec<_> = results.iter().filter(|(way, _)| way.rewarm == rewarm).collect();
        let Some((first, _)) = ways.first() else { continue };
        let (name, style) = (first.schedule(), colour(*first).stroke_width(2));
        let point = |perplexity: &Perplexity| (perplexity.new, perplexity.old);
        chart
            .draw_series(LineSeries::new(ways.iter().map(|(_, perplexity)| point(perplexity)), style))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
        chart.draw_series(ways.iter().map(|(way, perplexity)| {
            let text = Text::new(format!("{} %", way.replay), (8, -14), (FONT, 14));
            EmptyElement::at(point(perplexity)) + Circle::new((0, 0), 4, colour(*way).filled()) + text
        }))?;
    }
    chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
    Ok(())
}
