//! E8: one hostile site of four, under plain averaging and under each robust rule.

use anyhow::Result;
use toml::Table as Toml;

use super::{
    Finding, LOCAL_STEPS, Work,
    alteration::Alteration,
    averaging::Start,
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

/// E8, in the long form from both starts of E1.
pub(super) fn run(work: &Work) -> Result<Vec<Finding>> {
    let mut table =
        Table::new(&["start", "one of 4 sites", "rule", "loss", "to 4 honest sites", "deviation"]);
    let mut findings = Vec::new();
    for start in work.starts() {
        compare(work, *start, &mut table, &mut findings)?;
    }
    table.show("E8: one hostile site of 4.", &work.path("E8.csv"))?;
    Ok(findings)
}

/// The rows and the chart of one start; half as many steps as elsewhere.
fn compare(work: &Work, start: Start, table: &mut Table, findings: &mut Vec<Finding>) -> Result<()> {
    let seeds = work.seeds();
    let from = start.name();
    let clean = |seed| -> Result<Trial> {
        let clean = start.of(work, work.federated(SITES, Split::Mixed, LOCAL_STEPS, seed)?, seed)?;
        let rounds = clean.integer("rounds") / 2;
        Ok(clean.with("rounds", rounds))
    };
    let reference = work.by_seed(&format!("4 honest sites, from {from}"), &seeds, clean)?;
    let level = mean(&reference.losses);
    let attacks = if work.full { &ATTACKS[..] } else { &ATTACKS[..2] };
    let mut series = Vec::new();
    for (rule, keys) in RULES {
        let mut points = Vec::new();
        for (at, &(attack, alteration)) in attacks.iter().enumerate() {
            let aggregation: Toml = toml::from_str(keys)?;
            let result = work.by_seed(&format!("{attack}, {rule}, from {from}"), &seeds, |seed| {
                let trial = clean(seed)?.with("outer.aggregation", aggregation.clone());
                Ok(Trial { alterations: vec![(SITES, alteration)], ..trial })
            })?;
            let relative = result.relative_to(&reference);
            table.row([
                from.to_owned(),
                attack.to_owned(),
                rule.to_owned(),
                loss(mean(&result.losses)),
                percent(relative),
                if seeds.len() > 1 { loss(deviation(&result.losses)) } else { "-".to_owned() },
            ]);
            points.push((at as f64 + 1.0, mean(&result.losses)));
            let (relation, holds) = match rule {
                "mean" => ("worse by more than 5 % than", relative > 1.05),
                _ => ("within 5 % of", relative <= 1.05),
            };
            let relation = format!("from {from}: {attack}, {rule}: {relation} 4 honest sites");
            findings.push(Finding { experiment: "E8", relation, measured: percent(relative), holds });
        }
        series.push(Series::new(rule, points));
    }
    series.push(Series::new("4 honest sites", vec![(1.0, level), (attacks.len() as f64, level)]));
    Chart {
        title: &format!("E8: final held-out loss with one hostile site of 4, from {from}"),
        x: "1 sign flipped, 2 scaled by 100, 3 noise, 4 a constant",
        y: "nats per byte",
        log_x: false,
        log_y: true,
        series,
    }
    .draw(&work.path(&format!("E8 from {from}.svg")))
}
