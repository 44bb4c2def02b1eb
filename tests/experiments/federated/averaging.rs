//! How much is lost by averaging seldom: E1 over the number of sites, E3 over the local steps between averages, and
//! E5 over how the text lies at the sites.

use anyhow::Result;

use super::{
    Finding, LOCAL_STEPS, Work,
    chart::{Chart, Series},
    corpora::Split,
    outcome::Outcome,
    report::{Table, deviation, loss, mean, megabytes, percent},
    trial::Trial,
};

/// Losses of a kind of run by seed, and the first seed's outcome.
#[derive(Debug, Clone)]
pub(super) struct BySeed {
    pub losses: Vec<f64>,
    pub first: Outcome,
}

impl BySeed {
    /// Mean over the seeds of the loss relative to that of `other` with the same seed.
    pub(super) fn relative_to(&self, other: &Self) -> f64 {
        mean(&self.ratios_to(other))
    }

    /// Whether the loss is above that of `other` with the same seed, by two deviations of their ratio over the seeds;
    /// of `noise`, where there is one seed.
    pub(super) fn is_worse_than(&self, other: &Self, noise: f64) -> bool {
        let ratios = self.ratios_to(other);
        let deviation = if ratios.len() > 1 { deviation(&ratios) } else { noise };
        mean(&ratios) - 2.0 * deviation > 1.0
    }

    fn ratios_to(&self, other: &Self) -> Vec<f64> {
        self.losses.iter().zip(&other.losses).map(|(one, other)| one / other).collect()
    }
}

impl Work {
    /// Does the trial that `make` gives for each seed.
    pub(super) fn by_seed(
        &self,
        label: &str,
        seeds: &[i64],
        make: impl Fn(i64) -> Result<Trial>,
    ) -> Result<BySeed> {
        let outcomes: Vec<Outcome> = seeds
            .iter()
            .map(|seed| self.outcome(&format!("{label}, seed {seed}"), &make(*seed)?))
            .collect::<Result<_>>()?;
        let losses = outcomes.iter().map(|outcome| outcome.loss).collect();
        Ok(BySeed { losses, first: outcomes.into_iter().next().unwrap_or_default() })
    }
}

impl Work {
    /// What experiments other than E1 start from: new weights, and in the long form a trained model, too.
    pub(super) fn starts(&self) -> &'static [Start] {
        if self.full { &Start::ALL } else { &Start::ALL[..1] }
    }
}

/// E1: centralised training against 1, 2, 4 and 8 sites, from new weights and from a model that was trained
/// centrally on the same text, as DiLoCo's authors begin (arXiv 2311.08105, section 3).
pub(super) fn sites(work: &Work) -> Result<Vec<Finding>> {
    let mut table =
        Table::new(&["start", "training", "loss", "to centralised", "deviation", "MB up", "MB of gradients"]);
    let mut findings = Vec::new();
    for start in Start::ALL {
        compare(work, start, &mut table, &mut findings)?;
    }
    table.show("E1: as many tokens in as many steps, over so many sites.", &work.path("E1.csv"))?;
    Ok(findings)
}

/// What a training starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    NewWeights,
    TrainedModel,
}

impl Start {
    const ALL: [Self; 2] = [Self::NewWeights, Self::TrainedModel];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::NewWeights => "new weights",
            Self::TrainedModel => "a trained model",
        }
    }

    /// The trial from there: what goes on from a trained model takes a third of its learning rate.
    pub(super) fn of(self, work: &Work, trial: Trial, seed: i64) -> Result<Trial> {
        match self {
            Self::NewWeights => Ok(trial),
            Self::TrainedModel => {
                let start = work.started_by("centralised, to start from", &work.centralised(seed)?)?;
                Ok(Trial { start: Some(start), ..trial }.with("training.optimizer.learning_rate", 1e-3))
            }
        }
    }
}

/// The rows and the chart of one start.
fn compare(work: &Work, start: Start, table: &mut Table, findings: &mut Vec<Finding>) -> Result<()> {
    let mut series = Vec::new();
    let seeds = work.seeds();
    let from = start.name();
    let centralised = work.by_seed(&format!("centralised, from {from}"), &seeds, |seed| {
        start.of(work, work.centralised(seed)?, seed)
    })?;
    let mut row = |name: &str, result: &BySeed, gradients: f64| {
        table.row([
            from.to_owned(),
            name.to_owned(),
            loss(mean(&result.losses)),
            percent(result.relative_to(&centralised)),
            if seeds.len() > 1 { loss(deviation(&result.losses)) } else { "-".to_owned() },
            megabytes(result.first.bytes_up),
            megabytes(gradients),
        ]);
        series.push(Series::new(name, result.first.curve.clone()));
    };
    row("centralised", &centralised, 0.0);
    // One site computes what a centralised training does, but for the rounding of its deltas.
    for (sites, bound) in [(1, 1.0001), (2, 1.01), (4, 1.025), (8, 1.05)] {
        let make = |seed| {
            let trial = work.federated(sites, Split::Mixed, LOCAL_STEPS, seed)?;
            start.of(work, trial, seed)
        };
        let name = format!("{sites} sites");
        let result = work.by_seed(&format!("{name}, from {from}"), &seeds, make)?;
        let trial = make(1)?;
        row(&name, &result, trial.gradient_bytes()?);
        let relative = result.relative_to(&centralised);
        findings.push(Finding {
            experiment: "E1",
            relation: format!("K={sites}, from {from}: loss within {} of centralised", percent(bound)),
            measured: percent(relative),
            holds: relative <= bound && (sites > 1 || relative >= 2.0 - bound),
        });
        findings.push(bytes_fall("E1", &format!("K={sites}, from {from}"), &trial, &result)?);
    }
    Chart {
        title: &format!("E1: held-out loss by number of sites, from {from}"),
        x: "optimizer steps, of as many tokens each",
        y: "nats per byte",
        log_x: true,
        log_y: false,
        series,
    }
    .draw(&work.path(&format!("E1 from {from}.svg")))
}

/// Whether the deltas of a run have as many bytes as gradients at every step, divided by the local steps.
fn bytes_fall(experiment: &'static str, what: &str, trial: &Trial, result: &BySeed) -> Result<Finding> {
    let local_steps = trial.integer("training.local_steps");
    let saved = trial.gradient_bytes()? / result.first.bytes_up;
    Ok(Finding {
        experiment,
        relation: format!("{what}: bytes of deltas fall by H = {local_steps} exactly"),
        measured: format!("{saved:.3}"),
        holds: (saved - local_steps as f64).abs() < 1e-6,
    })
}

/// E3: local steps between two averages.
pub(super) fn local_steps(work: &Work) -> Result<Vec<Finding>> {
    let seeds = work.seeds();
    let centralised = work.by_seed("centralised", &seeds, |seed| work.centralised(seed))?;
    let mut table = Table::new(&["local steps", "rounds", "loss", "to centralised", "MB up", "seconds"]);
    let (mut points, mut findings) = (Vec::new(), Vec::new());
    // An average after every step takes as long as three other runs.
    let all = [1, 8, 32, 128, 512];
    for &local_steps in if work.full { &all[..] } else { &all[1..] } {
        let make = |seed| work.federated(4, Split::Mixed, local_steps, seed);
        let result = work.by_seed(&format!("4 sites, {local_steps} local steps"), &seeds, make)?;
        table.row([
            local_steps.to_string(),
            (work.steps / local_steps).to_string(),
            loss(mean(&result.losses)),
            percent(result.relative_to(&centralised)),
            megabytes(result.first.bytes_up),
            format!("{:.0}", result.first.seconds),
        ]);
        points.push((local_steps as f64, mean(&result.losses)));
        findings.push(bytes_fall("E3", "4 sites", &make(1)?, &result)?);
    }
    table.show("E3: 4 sites that average every so many steps.", &work.path("E3.csv"))?;
    let level = mean(&centralised.losses);
    let ends = [1.0, 512.0].map(|steps| (steps, level)).to_vec();
    Chart {
        title: "E3: final held-out loss by local steps per round, 4 sites",
        x: "local steps per round",
        y: "nats per byte",
        log_x: true,
        log_y: false,
        series: vec![Series::new("4 sites", points), Series::new("centralised", ends)],
    }
    .draw(&work.path("E3.svg"))?;
    Ok(findings)
}

/// E5: sites with text of one domain each against sites with all domains.
pub(super) fn domains(work: &Work) -> Result<Vec<Finding>> {
    let seeds = work.seeds();
    let [mixed, split] = [Split::Mixed, Split::ByDomain].map(|split| {
        work.by_seed(&format!("4 sites, {split:?}"), &seeds, |seed| {
            work.federated(4, split, LOCAL_STEPS, seed)
        })
    });
    let (mixed, split) = (mixed?, split?);
    let mut table = Table::new(&["text of 4 sites", "loss", "to mixed"]);
    for (name, result) in [("mixed", &mixed), ("a domain each", &split)] {
        table.row([name.to_owned(), loss(mean(&result.losses)), percent(result.relative_to(&mixed))]);
    }
    table.show("E5: sites with text of all domains, and of one each.", &work.path("E5.csv"))?;
    let relative = split.relative_to(&mixed);
    Chart {
        title: "E5: held-out loss, mean of the sites' own text",
        x: "optimizer steps",
        y: "nats per byte",
        log_x: true,
        log_y: false,
        series: vec![
            Series::new("mixed", mixed.first.curve),
            Series::new("a domain each", split.first.curve),
        ],
    }
    .draw(&work.path("E5.svg"))?;
    Ok(vec![Finding {
        experiment: "E5",
        relation: "a domain each: within 2 % of mixed".to_owned(),
        measured: percent(relative),
        holds: relative <= 1.02,
    }])
}
