//! E4: Photon's recipe (arXiv 2411.02908: the mean as it is, fresh optimizer state in each round, small batches)
//! against DiLoCo's (arXiv 2311.08105: Nesterov's momentum outside, optimizer state kept).

use anyhow::Result;
use toml::Table as Toml;

use super::{
    Finding, LOCAL_STEPS, Work,
    averaging::BySeed,
    chart::{Chart, Series},
    corpora::Split,
    report::{Table, loss, mean, percent},
    trial::Trial,
};

const SITES: usize = 4;

/// E4: at matched tokens, and at matched seconds of training.
pub(super) fn run(work: &Work) -> Result<Vec<Finding>> {
    let seeds = work.seeds();
    let diloco = |seed| -> Result<Trial> {
        let outer: Toml = toml::from_str("kind = \"nesterov\"\nlearning_rate = 0.7\nmomentum = 0.9")?;
        Ok(work.federated(SITES, Split::Mixed, LOCAL_STEPS, seed)?.with("outer.optimizer", outer))
    };
    let photon = |seed| -> Result<Trial> {
        Ok(work.federated(SITES, Split::Mixed, LOCAL_STEPS, seed)?.with("training.optimizer_state", "reset"))
    };
    // Half the batch and twice the steps in as many rounds.
    let small = |seed| {
        let trial = photon(seed)?;
        let batch = trial.integer("training.batch_size") / 2;
        Ok(trial.with("training.batch_size", batch).with("training.local_steps", 2 * LOCAL_STEPS))
    };
    let reference = work.by_seed("DiLoCo's recipe", &seeds, diloco)?;
    let same_batch = work.by_seed("Photon's recipe, DiLoCo's batch", &seeds, photon)?;
    let same_tokens = work.by_seed("Photon's recipe, half the batch", &seeds, small)?;
    let share = (reference.first.train_seconds / same_tokens.first.train_seconds).min(1.0);
    let rounds = ((diloco(1)?.integer("rounds") as f64 * share).round() as i64).max(1);
    let same_seconds = work.by_seed("Photon's recipe, half the batch, as many seconds", &seeds, |seed| {
        Ok(small(seed)?.with("rounds", rounds))
    })?;

    let mut table =
        Table::new(&["recipe", "batch of a site", "rounds", "M tokens", "training s", "loss", "to DiLoCo"]);
    let mut series = Vec::new();
    let mut row = |name: &str, trial: &Trial, result: &BySeed| {
        let batch = trial.integer("training.batch_size") as f64;
        table.row([
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
    row("the same, as many seconds", &small(1)?.with("rounds", rounds), &same_seconds);
    table.show("E4: Photon's recipe and DiLoCo's, 4 sites.", &work.path("E4.csv"))?;
    Chart {
        title: "E4: held-out loss by recipe",
        x: "million tokens",
        y: "nats per byte",
        log_x: true,
        log_y: false,
        series,
    }
    .draw(&work.path("E4.svg"))?;
    let relative = same_tokens.relative_to(&reference);
    Ok(vec![Finding {
        experiment: "E4",
        relation: "Photon's recipe learns more of as many tokens (2411.02908)".to_owned(),
        measured: percent(relative),
        holds: relative < 1.0,
    }])
}
