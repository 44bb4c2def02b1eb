//! Charts of lines and points, as SVG.

use std::{ops::Range, path::Path};

use anyhow::Result;
use plotters::{
    coord::{
        combinators::LogCoord,
        ranged1d::{AsRangedCoord, Ranged, ValueFormatter},
        types::RangedCoordf64,
    },
    prelude::*,
};

const SIZE: (u32, u32) = (760, 480);
const FONT: &str = "sans-serif";
const COLOURS: [RGBColor; 8] = [
    RGBColor(40, 90, 180),
    RGBColor(200, 60, 40),
    RGBColor(40, 150, 80),
    RGBColor(150, 80, 170),
    RGBColor(210, 140, 20),
    RGBColor(90, 90, 90),
    RGBColor(20, 160, 170),
    RGBColor(190, 70, 130),
];

/// A chart.
#[derive(Debug)]
pub(super) struct Chart<'a> {
    pub title: &'a str,
    pub x: &'a str,
    pub y: &'a str,
    pub log_x: bool,
    pub log_y: bool,
    pub series: Vec<Series>,
}

/// Points of one colour, joined where there are several.
#[derive(Debug)]
pub(super) struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

impl Series {
    pub(super) fn new(name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), points }
    }
}

impl Chart<'_> {
    /// Draws `path`, an SVG. Nothing is drawn of what is not finite.
    pub(super) fn draw(&self, path: &Path) -> Result<()> {
        let xs = range(&self.values(|point| point.0), self.log_x);
        let ys = range(&self.values(|point| point.1), self.log_y);
        match (self.log_x, self.log_y) {
            (false, false) => self.draw_with::<RangedCoordf64, RangedCoordf64>(path, xs, ys),
            (true, false) => self.draw_with::<LogCoord<f64>, RangedCoordf64>(path, xs.log_scale(), ys),
            (false, true) => self.draw_with::<RangedCoordf64, LogCoord<f64>>(path, xs, ys.log_scale()),
            (true, true) => {
                self.draw_with::<LogCoord<f64>, LogCoord<f64>>(path, xs.log_scale(), ys.log_scale())
            }
        }
    }

    fn values(&self, of: impl Fn(&(f64, f64)) -> f64) -> Vec<f64> {
        self.series
            .iter()
            .flat_map(|series| series.points.iter().map(&of))
            .filter(|one| one.is_finite())
            .collect()
    }

    fn draw_with<X, Y>(
        &self,
        path: &Path,
        xs: impl AsRangedCoord<CoordDescType = X, Value = f64>,
        ys: impl AsRangedCoord<CoordDescType = Y, Value = f64>,
    ) -> Result<()>
    where
        X: Ranged<ValueType = f64> + ValueFormatter<f64>,
        Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let area = SVGBackend::new(path, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(self.title, (FONT, 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(xs, ys)?;
        let figure = |value: &f64| format!("{}", (value * 1e4).round() / 1e4);
        chart
            .configure_mesh()
            .x_desc(self.x)
            .y_desc(self.y)
            .x_label_formatter(&figure)
            .y_label_formatter(&figure)
            .draw()?;
        for (series, colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            let points = || series.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite());
            let style = colour.stroke_width(2);
            chart.draw_series(LineSeries::new(points(), style))?;
            chart
                .draw_series(points().map(|point| Circle::new(point, 4, colour.filled())))?
                .label(&series.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
        area.present()?;
        Ok(())
    }
}

/// A range that holds all values, with some room.
fn range(values: &[f64], log: bool) -> Range<f64> {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if least > most {
        return 0.1..1.0;
    }
    if log {
        return least.max(1e-9) / 1.2..most.max(1e-9) * 1.2;
    }
    let room = 0.08 * (most - least).max(1e-3);
    least - room..most + room
}
