//! E7: measured round times over shaped links against a model of the wall time.
//!
//! The model follows Photon's (arXiv 2411.02908, wall-time model): a round takes the time of its local steps and that
//! of moving what goes down and up. Photon's parameter server shares one link among K sites; here each site has a
//! link of its own, so that K falls out. The first time is measured once, over links that are not shaped; the second
//! is bytes by bandwidth. What streaming moves beside local steps takes time only where it lasts longer than they.

use anyhow::Result;

use super::{
    Finding, Work,
    averaging::BySeed,
    chart::{Chart, Series},
    corpora::Split,
    report::{Table, percent},
    trial::{Links, Trial},
};

const SITES: usize = 2;
const LOCAL_STEPS: i64 = 64;
const ROUNDS: i64 = 6;
const MEGABITS: [u32; 3] = [1, 10, 100];

/// Utilisation above which there is little to be gained.
const UTILISED: f64 = 0.9;
/// Local steps that streaming takes beside the transfer of a fragment.
const OVERLAP: i64 = 56;

/// How a round's bytes are moved.
#[derive(Debug, Clone, Copy)]
struct Wire {
    name: &'static str,
    delta: &'static str,
    model: &'static str,
    /// Two fragments, one a round, beside [`OVERLAP`] local steps.
    streaming: bool,
}

const WIRES: [Wire; 3] = [
    Wire { name: "fp32", delta: "fp32", model: "fp32", streaming: false },
    Wire { name: "e3m0", delta: "e3m0", model: "e3m0-update", streaming: false },
    Wire { name: "fp32, streaming", delta: "fp32", model: "fp32", streaming: true },
];

impl Wire {
    /// Seconds of a round whose local steps take `steps` and whose bytes take `transfer`.
    fn model(self, steps: f64, transfer: f64) -> f64 {
        let hidden = if self.streaming { steps * OVERLAP as f64 / LOCAL_STEPS as f64 } else { 0.0 };
        steps + (transfer - hidden).max(0.0)
    }
}

/// E7, with fp32, with four bits in both directions, and with fp32 streaming.
pub(super) fn run(work: &Work) -> Result<Vec<Finding>> {
    let trial = |wire: Wire, megabits: Option<u32>| -> Result<Trial> {
        let mut trial = work
            .federated(SITES, Split::Mixed, LOCAL_STEPS, 1)?
            .with("rounds", ROUNDS)
            // Small enough for 1 Mbit/s.
            .with("model.hidden_size", 64)
            .with("model.intermediate_size", 176)
            .with("model.num_hidden_layers", 2)
            .with("training.schedule.warmup_steps", 10)
            .with("wire.chunk_parameters", 16_384)
            .with("wire.delta_encoding", wire.delta)
            .with("wire.model_encoding", wire.model);
        if wire.streaming {
            trial = trial
                .with("outer.streaming.fragments", 2)
                .with("outer.streaming.overlap", OVERLAP)
                .with("outer.streaming.mixing", 0.5);
        }
        trial.links = Links::Namespaces(megabits);
        Ok(trial)
    };
    let mut table = Table::new(&[
        "link",
        "encoding",
        "kB a round",
        "measured s",
        "model s",
        "off by",
        "utilisation",
        "model",
    ]);
    let (mut findings, mut series) = (Vec::new(), Vec::new());
    // Of fp32 without streaming, the first wire, at each bandwidth.
    let mut plain_utilisation = Vec::new();
    for wire in WIRES {
        let go = |name: &str, megabits| {
            work.by_seed(&format!("2 sites, {}, {name}", wire.name), &[1], |_| trial(wire, megabits))
        };
        let unshaped = round_seconds(&go("links as they are", None)?);
        let (mut measured_points, mut model_points) = (Vec::new(), Vec::new());
        for (at, megabits) in MEGABITS.into_iter().enumerate() {
            let name = format!("{megabits} Mbit/s");
            let result = go(&name, Some(megabits))?;
            let bytes = round_bytes(&result);
            let model = wire.model(unshaped, 8.0 * bytes / (f64::from(megabits) * 1e6));
            let measured = round_seconds(&result);
            let off = measured / model;
            table.row([
                name.clone(),
                wire.name.to_owned(),
                format!("{:.0}", bytes / 1e3),
                format!("{measured:.2}"),
                format!("{model:.2}"),
                percent(off),
                format!("{:.0} %", 100.0 * unshaped / measured),
                format!("{:.0} %", 100.0 * unshaped / model),
            ]);
            measured_points.push((f64::from(megabits), measured));
            model_points.push((f64::from(megabits), model));
            findings.push(Finding {
                experiment: "E7",
                relation: format!("{name}, {}: round time within 15 % of the model", wire.name),
                measured: percent(off),
                holds: (off - 1.0).abs() <= 0.15,
            });
            let (utilisation, predicted) = (unshaped / measured, unshaped / model);
            match plain_utilisation.get(at) {
                Some(plain) if *plain < UTILISED => findings.push(Finding {
                    experiment: "E7",
                    relation: format!(
                        "{name}, {}: utilisation rises from {:.0} % to the predicted {:.0} %, within 15 %",
                        wire.name,
                        100.0 * plain,
                        100.0 * predicted
                    ),
                    measured: format!("{:.0} %", 100.0 * utilisation),
                    holds: utilisation > *plain && (utilisation / predicted - 1.0).abs() <= 0.15,
                }),
                Some(_) => {}
                None => plain_utilisation.push(utilisation),
            }
        }
        series.push(Series::new(format!("{}, measured", wire.name), measured_points));
        series.push(Series::new(format!("{}, model", wire.name), model_points));
    }
    table.show(
        "E7: a round of 2 sites over shaped links; median of all rounds but the first. Utilisation: a round over links \
         that are not shaped, as a part of this one.",
        &work.path("E7.csv"),
    )?;
    Chart {
        title: "E7: seconds of a round by bandwidth, 2 sites",
        x: "Mbit/s",
        y: "seconds",
        log_x: true,
        log_y: true,
        series,
    }
    .draw(&work.path("E7.svg"))?;
    Ok(findings)
}

/// Median of the rounds' times but the first's, in which sites tokenise.
fn round_seconds(result: &BySeed) -> f64 {
    median(result.first.round_seconds.get(1..).unwrap_or_default())
}

/// Bytes that go down and up for a site in a round.
fn round_bytes(result: &BySeed) -> f64 {
    median(&result.first.round_bytes) / SITES as f64
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
