//! E2: what the encodings of deltas cost in loss, and save in bytes.

use anyhow::{Context, Result};
use consort_common::codec::Encoding;

use super::{
    Finding, LOCAL_STEPS, Work,
    alteration::Alteration,
    averaging::{BySeed, Start},
    chart::{Chart, Series},
    corpora::Split,
    report::{Table, deviation, loss, mean, megabytes, percent},
};

const SITES: usize = 4;

/// E2: every encoding, and some that the product does not have, made by gateways; in the long form from both starts of
/// E1.
pub(super) fn run(work: &Work) -> Result<Vec<Finding>> {
    let mut table = Table::new(&["start", "encoding", "loss", "to fp32", "MB up", "times fewer"]);
    let mut findings = Vec::new();
    for start in work.starts() {
        compare(work, *start, &mut table, &mut findings)?;
    }
    let title = "E2: encodings of deltas, 4 sites. What has no error feedback, or is dropped, a gateway makes of fp32.";
    table.show(title, &work.path("E2.csv"))?;
    Ok(findings)
}

/// The rows and the chart of one start.
fn compare(work: &Work, start: Start, table: &mut Table, findings: &mut Vec<Finding>) -> Result<()> {
    let seeds = work.seeds();
    let from = start.name();
    let federated = |seed| start.of(work, work.federated(SITES, Split::Mixed, LOCAL_STEPS, seed)?, seed);
    let encoded = |encoding: Encoding, seeds: &[i64]| {
        work.by_seed(&format!("4 sites, {}, from {from}", encoding.name()), seeds, |seed| {
            Ok(federated(seed)?.with("wire.delta_encoding", encoding.name()))
        })
    };
    // How much the loss depends on the seed is what losses are held against.
    let fp32 = encoded(Encoding::Fp32, &[1, 2, 3])?;
    let noise = deviation(&fp32.losses) / mean(&fp32.losses);
    let mut series = Vec::new();
    let mut row = |name: &str, result: &BySeed, bytes: f64| {
        let of_seeds = mean(&result.losses[..seeds.len()]);
        table.row([
            from.to_owned(),
            name.to_owned(),
            loss(of_seeds),
            percent(result.relative_to(&fp32)),
            megabytes(bytes),
            format!("{:.2}", fp32.first.bytes_up / bytes),
        ]);
        series.push(Series::new(name, vec![(bytes / 1e6, of_seeds)]));
    };
    row("fp32", &fp32, fp32.first.bytes_up);
    let mut results = Vec::new();
    for encoding in Encoding::ALL.into_iter().skip(1) {
        let result = encoded(encoding, &seeds)?;
        row(encoding.name(), &result, result.first.bytes_up);
        results.push((encoding, result));
    }
    let of = |encoding: Encoding| {
        let found = results.iter().find(|(one, _)| *one == encoding);
        found.map(|(_, result)| result).with_context(|| format!("{} was measured", encoding.name()))
    };
    let (two_bits, topk) = (of(Encoding::TwoBit)?, of(Encoding::TopK)?);
    let (bytes, topk_bytes) = (two_bits.first.bytes_up, topk.first.bytes_up);
    let kept = (bytes / fp32.first.bytes_up) as f32;
    let mut altered = |name: &str, alteration: Alteration, bytes: f64| {
        let label = format!("4 sites, {alteration:?}, from {from}");
        let result = work.by_seed(&label, &seeds, |seed| {
            let mut trial = federated(seed)?;
            trial.alterations = (1..=SITES).map(|site| (site, alteration)).collect();
            Ok(trial)
        })?;
        row(name, &result, bytes);
        anyhow::Ok(result)
    };
    let two_bits_alone = altered("2bit, no error feedback", Alteration::TwoBitsWithoutFeedback, bytes)?;
    let topk_alone = altered("topk, no error feedback", Alteration::TopkWithoutFeedback, topk_bytes)?;
    let dropped = altered("randomly dropped values", Alteration::RandomlyDropped(kept), bytes)?;
    let rescaled = altered("the same, rescaled", Alteration::RandomlyDroppedAndRescaled(kept), bytes)?;
    Chart {
        title: &format!("E2: final held-out loss by bytes of deltas, from {from}"),
        x: "MB of deltas",
        y: "nats per byte",
        log_x: true,
        log_y: false,
        series,
    }
    .draw(&work.path(&format!("E2 from {from}.svg")))?;

    let trial = federated(1)?;
    let of_fp32 = trial.gradient_bytes()? / LOCAL_STEPS as f64;
    let (mut ratios, mut exact) = (Vec::new(), fp32.first.bytes_up == trial.delta_bytes(Encoding::Fp32)?);
    for (encoding, result) in &results {
        ratios.push(format!("{} {:.2}", encoding.name(), of_fp32 / result.first.bytes_up));
        exact &= result.first.bytes_up == trial.delta_bytes(*encoding)?;
    }
    findings.push(Finding {
        experiment: "E2",
        relation: format!(
            "from {from}: bytes of deltas fall by H = {LOCAL_STEPS} times the ratio of the encoding's layout"
        ),
        measured: ratios.join(", "),
        holds: exact,
    });
    let mut finding = |relation: String, measured: f64, holds: bool| {
        let relation = format!("from {from}: {relation}");
        findings.push(Finding { experiment: "E2", relation, measured: percent(measured), holds });
    };
    for encoding in [Encoding::Int8, Encoding::E3m0] {
        let relative = of(encoding)?.relative_to(&fp32);
        let relation = format!("{} within two deviations of seeds ({:.2} %)", encoding.name(), 200.0 * noise);
        finding(relation, relative, relative <= 1.0 + 2.0 * noise);
    }
    let relative = two_bits.relative_to(&fp32);
    finding("2bit with error feedback within 1 %".to_owned(), relative, relative <= 1.01);
    for (what, one, other) in [
        ("2bit without error feedback worse than with", &two_bits_alone, two_bits),
        ("topk without error feedback worse than with", &topk_alone, topk),
        ("random dropping of the bytes of 2bit worse than 2bit", &dropped, two_bits),
        ("random dropping and rescaling worse than 2bit", &rescaled, two_bits),
    ] {
        let relation = format!("{what} ({}), seed by seed", percent(other.relative_to(&fp32)));
        finding(relation, one.relative_to(&fp32), one.is_worse_than(other, noise));
    }
    Ok(())
}
