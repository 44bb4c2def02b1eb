//! E2: what the encodings of deltas cost in loss, and save in bytes.

use anyhow::Result;
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

/// E2: every encoding, and some that the product does not have, made by gateways; from the starts of E1.
pub(super) fn run(work: &Work) -> Result<Vec<Finding>> {
    let mut table = Table::new(&["start", "encoding", "loss", "to fp32", "MB up", "times fewer"]);
    let mut findings = Vec::new();
    for start in [Start::NewWeights, Start::TrainedModel] {
        compare(work, start, &mut table, &mut findings)?;
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
        result.relative_to(&fp32)
    };
    row("fp32", &fp32, fp32.first.bytes_up);
    let mut results = Vec::new();
    for encoding in Encoding::ALL.into_iter().skip(1) {
        let result = encoded(encoding, &seeds)?;
        let relative = row(encoding.name(), &result, result.first.bytes_up);
        results.push((encoding, relative, result.first.bytes_up));
    }
    let of = |encoding: Encoding| {
        let found = results.iter().find(|(one, ..)| *one == encoding);
        found.map_or((f64::NAN, f64::NAN), |(_, relative, bytes)| (*relative, *bytes))
    };
    let ((two_bits, bytes), (topk, topk_bytes)) = (of(Encoding::TwoBit), of(Encoding::TopK));
    let kept = (bytes / fp32.first.bytes_up) as f32;
    let mut altered = |name: &str, alteration: Alteration, bytes: f64| {
        let label = format!("4 sites, {alteration:?}, from {from}");
        let result = work.by_seed(&label, &seeds, |seed| {
            let mut trial = federated(seed)?;
            trial.alterations = (1..=SITES).map(|site| (site, alteration)).collect();
            Ok(trial)
        })?;
        anyhow::Ok(row(name, &result, bytes))
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

    let mut finding = |relation: String, measured: f64, holds: bool| {
        let relation = format!("from {from}: {relation}");
        findings.push(Finding { experiment: "E2", relation, measured: percent(measured), holds });
    };
    for encoding in [Encoding::Int8, Encoding::E3m0] {
        let (relative, _) = of(encoding);
        let relation = format!("{} within two deviations of seeds ({:.2} %)", encoding.name(), 200.0 * noise);
        finding(relation, relative, relative <= 1.0 + 2.0 * noise);
    }
    finding("2bit with error feedback within 1 %".to_owned(), two_bits, two_bits <= 1.01);
    let worse = |than: f64, measured: f64| measured > than + 2.0 * noise;
    for (name, with, without) in [("2bit", two_bits, two_bits_alone), ("topk", topk, topk_alone)] {
        let relation =
            format!("{name} without error feedback worse than with ({}) by two deviations", percent(with));
        finding(relation, without, worse(with, without));
    }
    for (name, relative) in [("", dropped), (" and rescaling", rescaled)] {
        let relation =
            format!("random dropping of the bytes of 2bit{name} worse than 2bit by two deviations");
        finding(relation, relative, worse(two_bits, relative));
    }
    Ok(())
}
