//! E8: one hostile site of four, under plain averaging and under each robust rule.

use anyhow::Result;
use toml::Table as Toml;

use super::{
    Finding, LOCAL_STEPS, Work,
    alteration::Alteration,
    chart::{Chart, Series},
    corpora::Split,
    report::{Table, deviation, loss, mean, percent},
    trial::Trial,
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

/// E8: half as many steps as elsewhere.
pub(super) fn run(work: &Work) -> Result<Vec<Finding>> {
    let seeds = work.seeds();
    let clean = |seed| -> Result<Trial> {
        let clean = work.federated(SITES, Split::Mixed, LOCAL_STEPS, seed)?;
        let rounds = clean.integer("rounds") / 2;
        Ok(clean.with("rounds", rounds))
    };
    let reference = work.by_seed("4 honest sites", &seeds, clean)?;
    let level = mean(&reference.losses);
    let attacks = if work.full { &ATTACKS[..] } else { &ATTACKS[..2] };
    let mut table = Table::new(&["one of 4 sites", "rule", "loss", "to 4 honest sites", "deviation"]);
    let (mut findings, mut series) = (Vec::new(), Vec::new());
    for (rule, keys) in RULES {
        let mut points = Vec::new();
        for (at, &(attack, alteration)) in attacks.iter().enumerate() {
            let aggregation: Toml = toml::from_str(keys)?;
            let result = work.by_seed(&format!("{attack}, {rule}"), &seeds, |seed| {
                let trial = clean(seed)?.with("outer.aggregation", aggregation.clone());
                Ok(Trial { alterations: vec![(SITES, alteration)], ..trial })
            })?;
            let relative = result.relative_to(&reference);
            table.row([
                attack.to_owned(),
                rule.to_owned(),
                loss(mean(&result.losses)),
                percent(relative),
                if seeds.len() > 1 { loss(deviation(&result.losses)) } else { "-".to_owned() },
            ]);
            points.push((at as f64 + 1.0, mean(&result.losses)));
            let (relation, holds) = match rule {
                "mean" => (format!("{attack}, mean: worse by more than 5 %"), relative > 1.05),
                _ => (format!("{attack}, {rule}: within 5 % of 4 honest sites"), relative <= 1.05),
            };
            findings.push(Finding { experiment: "E8", relation, measured: percent(relative), holds });
        }
        series.push(Series::new(rule, points));
    }
    table.show("E8: one hostile site of 4.", &work.path("E8.csv"))?;
    series.push(Series::new("4 honest sites", vec![(1.0, level), (attacks.len() as f64, level)]));
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
