//! E4: Photon's recipe (arXiv 2411.02908: the mean as it is, fresh optimizer state in each round, small batches
//! with high learning rates) against DiLoCo's (arXiv 2311.08105: Nesterov's momentum outside, optimizer state kept).

use anyhow::Result;
use toml::Table as Toml;

use super::{
    Finding, LOCAL_STEPS, Work,
    averaging::{BySeed, Start},
    chart::{Chart, Series},
    corpora::Split,
    report::{Table, loss, mean, percent},
    trial::Trial,
};

const SITES: usize = 4;

/// E4, in the long form from both starts of E1. All train as many tokens, which is as much compute: the outer
/// optimizer takes none of the sites' (see the table's seconds).
pub(super) fn run(work: &Work) -> Result<Vec<Finding>> {
    let mut table = Table::new(&[
        "start",
        "recipe",
        "batch of a site",
        "rounds",
        "M tokens",
        "training s",
        "loss",
        "to DiLoCo",
    ]);
    let mut findings = Vec::new();
    for start in work.starts() {
        compare(work, *start, &mut table, &mut findings)?;
    }
    table.show("E4: Photon's recipe and DiLoCo's, 4 sites.", &work.path("E4.csv"))?;
    Ok(findings)
}

/// The rows and the chart of one start.
fn compare(work: &Work, start: Start, table: &mut Table, findings: &mut Vec<Finding>) -> Result<()> {
    let seeds = work.seeds();
    let from = start.name();
    let plain = |seed| start.of(work, work.federated(SITES, Split::Mixed, LOCAL_STEPS, seed)?, seed);
    let diloco = |seed| -> Result<Trial> {
        let outer: Toml = toml::from_str("kind = \"nesterov\"\nlearning_rate = 0.7\nmomentum = 0.9")?;
        Ok(plain(seed)?.with("outer.optimizer", outer))
    };
    let photon = |seed| -> Result<Trial> { Ok(plain(seed)?.with("training.optimizer_state", "reset")) };
    // Half the batch and twice the steps in as many rounds.
    let small = |seed| -> Result<Trial> {
        let trial = photon(seed)?;
        let batch = trial.integer("training.batch_size") / 2;
        Ok(trial.with("training.batch_size", batch).with("training.local_steps", 2 * LOCAL_STEPS))
    };
    let fast = |seed| -> Result<Trial> {
        let trial = small(seed)?;
        let rate = 2.0 * trial.number("training.optimizer.learning_rate")?;
        Ok(trial.with("training.optimizer.learning_rate", rate))
    };
    let by_seed = |name: &str, make: &dyn Fn(i64) -> Result<Trial>| {
        work.by_seed(&format!("{name}, from {from}"), &seeds, make)
    };
    let reference = by_seed("DiLoCo's recipe", &diloco)?;
    let same_batch = by_seed("Photon's recipe, DiLoCo's batch", &photon)?;
    let same_tokens = by_seed("Photon's recipe, half the batch", &small)?;
    let twice_the_rate = by_seed("Photon's recipe, half the batch, twice the learning rate", &fast)?;

    let mut series = Vec::new();
    let mut row = |name: &str, trial: &Trial, result: &BySeed| {
        let batch = trial.integer("training.batch_size") as f64;
        table.row([
            from.to_owned(),
            name.to_owned(),
            trial.integer("training.batch_size").to_string(),
            trial.integer("rounds").to_string(),
            format!("{:.2}", result.first.tokens / 1e6),
            format!("{:.0}", result.first.train_seconds),
            loss(mean(&result.losses)),
            percent(result.relative_to(&reference)),
        ]);
        let tokens = batch * SITES as f64 * trial.integer("training.sequence_length") as f64 / 1e6;
        let points = result.first.curve.iter().map(|(step, loss)| (step * tokens, *loss));
        series.push(Series::new(name, points.collect()));
    };
    row("DiLoCo", &diloco(1)?, &reference);
    row("Photon, the same batch", &photon(1)?, &same_batch);
    row("Photon, half the batch", &small(1)?, &same_tokens);
    row("the same, twice the learning rate", &fast(1)?, &twice_the_rate);
    Chart {
        title: &format!("E4: held-out loss by recipe, from {from}"),
        x: "million tokens",
        y: "nats per byte",
        log_x: true,
        log_y: false,
        series,
    }
    .draw(&work.path(&format!("E4 from {from}.svg")))?;
    for (what, result) in [("", &same_tokens), (" at twice the learning rate", &twice_the_rate)] {
        let relative = result.relative_to(&reference);
        findings.push(Finding {
            experiment: "E4",
            relation: format!(
                "from {from}: Photon's recipe{what} learns more of as many tokens (2411.02908)"
            ),
            measured: percent(relative),
            holds: relative < 1.0,
        });
    }
    Ok(())
}
