//! E8: one hostile site of four, under plain averaging and under each robust rule.

use anyhow::Result;
use toml::Table as Toml;

use super::{
    Finding, LOCAL_STEPS, Work,
    alteration::Alteration,
    chart::{Chart, Series},
    corpora::Split,
    report::{Table, loss, percent},
};

const SITES: usize = 4;
/// The short form does the first two: one that no norm gives away, and one that its norm does.
const ATTACKS: [(&str, Alteration); 4] = [
    ("sign flipped", Alteration::SignFlipped),
    ("scaled by 100", Alteration::Scaled(100.0)),
    ("noise of 100 times its norm", Alteration::Noise(100.0)),
    ("a constant", Alteration::Constant(0.1)),
];
/// Rules as `[outer.aggregation]` has them. Krum's bound would need five sites for one hostile one: of four it
/// leaves out who is far from the others, and nothing is proven.
const RULES: [(&str, &str); 6] = [
    ("mean", "kind = \"mean\""),
    ("clipped-mean", "kind = \"clipped-mean\"\nfactor = 1.0"),
    ("trimmed-mean", "kind = \"trimmed-mean\"\nfraction = 0.25"),
    ("median", "kind = \"median\""),
    ("krum", "kind = \"krum\"\nhostile = 0"),
    ("multi-krum", "kind = \"multi-krum\"\nhostile = 0"),
];

/// E8: half as many steps as elsewhere, one seed.
pub(super) fn run(work: &Work) -> Result<Vec<Finding>> {
    let clean = work.federated(SITES, Split::Mixed, LOCAL_STEPS, 1)?;
    let clean = clean.clone().with("rounds", clean.integer("rounds") / 2);
    let reference = work.outcome("4 honest sites", &clean)?.loss;
    let attacks = if work.full { &ATTACKS[..] } else { &ATTACKS[..2] };
    let mut table = Table::new(&["one of 4 sites", "rule", "loss", "to 4 honest sites"]);
    let (mut findings, mut series) = (Vec::new(), Vec::new());
    for (rule, keys) in RULES {
        let mut points = Vec::new();
        for (at, &(attack, alteration)) in attacks.iter().enumerate() {
            let aggregation: Toml = toml::from_str(keys)?;
            let mut trial = clean.clone().with("outer.aggregation", aggregation);
            trial.alterations = vec![(SITES, alteration)];
            let outcome = work.outcome(&format!("{attack}, {rule}"), &trial)?;
            let relative = outcome.loss / reference;
            table.row([attack.to_owned(), rule.to_owned(), loss(outcome.loss), percent(relative)]);
            points.push((at as f64 + 1.0, outcome.loss));
            let (relation, holds) = match rule {
                "mean" => (format!("{attack}, mean: worse by more than 5 %"), relative > 1.05),
                _ => (format!("{attack}, {rule}: within 5 % of 4 honest sites"), relative <= 1.05),
            };
            findings.push(Finding { experiment: "E8", relation, measured: percent(relative), holds });
        }
        series.push(Series::new(rule, points));
    }
    table.show("E8: one hostile site of 4.", &work.path("E8.csv"))?;
    series.push(Series::new("4 honest sites", vec![(1.0, reference), (attacks.len() as f64, reference)]));
    Chart {
        title: "E8: final held-out loss with one hostile site of 4",
        x: "1 sign flipped, 2 scaled by 100, 3 noise, 4 a constant",
        y: "nats per byte",
        log_x: false,
        log_y: true,
        series,
    }
    .draw(&work.path("E8.svg"))?;
    Ok(findings)
}
