//! E2: what the encodings of deltas cost in loss, and save in bytes.

use anyhow::Result;
use consort_common::codec::Encoding;

use super::{
    Finding, LOCAL_STEPS, Work,
    alteration::Alteration,
    averaging::BySeed,
    chart::{Chart, Series},
    corpora::Split,
    report::{Table, deviation, loss, mean, megabytes, percent},
};

const SITES: usize = 4;

/// E2: every encoding, and two that the product does not have, made by gateways.
pub(super) fn run(work: &Work) -> Result<Vec<Finding>> {
    let seeds = work.seeds();
    let encoded = |encoding: Encoding, seeds: &[i64]| {
        work.by_seed(&format!("4 sites, {}", encoding.name()), seeds, |seed| {
            Ok(work
                .federated(SITES, Split::Mixed, LOCAL_STEPS, seed)?
                .with("wire.delta_encoding", encoding.name()))
        })
    };
    // How much the loss depends on the seed is what losses are held against.
    let fp32 = encoded(Encoding::Fp32, &[1, 2, 3])?;
    let noise = deviation(&fp32.losses) / mean(&fp32.losses);
    let mut table = Table::new(&["encoding", "loss", "to fp32", "MB up", "times fewer"]);
    let mut series = Vec::new();
    let mut row = |name: &str, result: &BySeed, bytes: f64| {
        let times = fp32.first.bytes_up / bytes;
        let of_seeds = loss(mean(&result.losses[..seeds.len()]));
        let relative = percent(result.relative_to(&fp32));
        table.row([name.to_owned(), of_seeds, relative, megabytes(bytes), format!("{times:.2}")]);
        series.push(Series::new(name, vec![(bytes / 1e6, mean(&result.losses[..seeds.len()]))]));
    };
    row("fp32", &fp32, fp32.first.bytes_up);
    let mut results = Vec::new();
    for encoding in Encoding::ALL.into_iter().skip(1) {
        let result = encoded(encoding, &seeds)?;
        row(encoding.name(), &result, result.first.bytes_up);
        results.push((encoding, result));
    }
    let of = |encoding: Encoding| results.iter().find(|(one, _)| *one == encoding).map(|(_, result)| result);
    let bytes = of(Encoding::TwoBit).map_or(f64::NAN, |result| result.first.bytes_up);
    let kept = (bytes / fp32.first.bytes_up) as f32;
    let altered = |alteration: Alteration| {
        work.by_seed(&format!("4 sites, {alteration:?}"), &seeds, |seed| {
            let mut trial = work.federated(SITES, Split::Mixed, LOCAL_STEPS, seed)?;
            trial.alterations = (1..=SITES).map(|site| (site, alteration)).collect();
            Ok(trial)
        })
    };
    let without = altered(Alteration::TwoBitsWithoutFeedback)?;
    row("2bit, no error feedback", &without, bytes);
    let dropped = altered(Alteration::RandomlyDropped(kept))?;
    row("randomly dropped values", &dropped, bytes);
    let rescaled = altered(Alteration::RandomlyDroppedAndRescaled(kept))?;
    row("the same, rescaled", &rescaled, bytes);

    let title = format!(
        "E2: encodings of deltas, 4 sites. The deviation of fp32 over 3 seeds is {:.2} %. What is below topk is made \
         of fp32 by a gateway, with bytes as for 2bit.",
        100.0 * noise
    );
    table.show(&title, &work.path("E2.csv"))?;
    Chart {
        title: "E2: final held-out loss by bytes of deltas",
        x: "MB of deltas",
        y: "nats per byte",
        log_x: true,
        log_y: false,
        series,
    }
    .draw(&work.path("E2.svg"))?;

    let mut findings = Vec::new();
    let mut finding = |relation: String, measured: String, holds: bool| {
        findings.push(Finding { experiment: "E2", relation, measured, holds });
    };
    for encoding in [Encoding::Int8, Encoding::E3m0] {
        let relative = of(encoding).map_or(f64::NAN, |result| result.relative_to(&fp32));
        let relation =
            format!("{}: within two deviations of seeds ({:.2} %)", encoding.name(), 200.0 * noise);
        finding(relation, percent(relative), relative <= 1.0 + 2.0 * noise);
    }
    let with = of(Encoding::TwoBit).map_or(f64::NAN, |result| result.relative_to(&fp32));
    finding("2bit with error feedback: within 1 %".to_owned(), percent(with), with <= 1.01);
    let without = without.relative_to(&fp32);
    let relation = "2bit without error feedback: worse than with by two deviations".to_owned();
    finding(relation, percent(without), without > with + 2.0 * noise);
    let best = dropped.relative_to(&fp32).min(rescaled.relative_to(&fp32));
    let relation = "random dropping of the same bytes: worse than 2bit by 1 %".to_owned();
    finding(relation, percent(best), best > with + 0.01);
    Ok(findings)
}
