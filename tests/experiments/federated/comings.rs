//! E6: deltas that are dropped, and sites that are killed and added.

use anyhow::Result;

use super::{
    Finding, LOCAL_STEPS, Work,
    chart::{Chart, Series},
    corpora::Split,
    report::{Table, loss, mean, percent},
    trial::{Event, What},
};

/// Sites of which some deltas are dropped.
const SITES: usize = 10;
/// Sites at a time in the run in which sites come and go.
const STEADY: usize = 4;

/// E6. A delta is dropped by over-selection: all sites train, a round ends with the first deltas, and the others'
/// work is lost.
pub(super) fn run(work: &Work) -> Result<Vec<Finding>> {
    let seeds = work.seeds();
    let sites = i64::try_from(SITES)?;
    // One sequence each.
    let centralised = work.by_seed("centralised, 10 sequences a step", &seeds, |seed| {
        Ok(work.centralised(seed)?.with("training.batch_size", sites))
    })?;
    let mut table = Table::new(&["10 sites", "loss", "to all deltas", "to centralised"]);
    let (mut points, mut findings, mut all) = (Vec::new(), Vec::new(), None);
    let shares: &[i64] = if work.full { &[0, 1, 3, 5] } else { &[0, 5] };
    for &dropped in shares {
        let result =
            work.by_seed(&format!("10 sites, {dropped} deltas dropped a round"), &seeds, |seed| {
                let trial = work
                    .federated(SITES, Split::Mixed, LOCAL_STEPS, seed)?
                    .with("training.batch_size", 1)
                    .with("participation.clients_per_round", sites - dropped)
                    .with("participation.over_selection", dropped);
                Ok(trial)
            })?;
        let reference = all.get_or_insert_with(|| result.clone());
        let relative = result.relative_to(reference);
        table.row([
            format!("{} % dropped", 10 * dropped),
            loss(mean(&result.losses)),
            percent(relative),
            percent(result.relative_to(&centralised)),
        ]);
        points.push((10.0 * dropped as f64, mean(&result.losses)));
        if dropped == 5 {
            findings.push(Finding {
                experiment: "E6",
                relation: "half of all deltas dropped: within 3 % of none".to_owned(),
                measured: percent(relative),
                holds: relative <= 1.03,
            });
        }
    }

    let steady =
        work.by_seed("4 sites", &seeds, |seed| work.federated(STEADY, Split::Mixed, LOCAL_STEPS, seed))?;
    let unsteady = work.by_seed("sites that come and go", &seeds, |seed| {
        let mut trial = work
            .federated(STEADY, Split::Mixed, LOCAL_STEPS, seed)?
            .with("participation.minimum_clients", 2)
            .with("participation.quorum", 2)
            .with("participation.deadline_seconds", 20);
        let rounds = u64::try_from(trial.integer("rounds"))?;
        // The third is killed and comes back; the fourth joins in the middle.
        trial.events = vec![
            Event { round: rounds / 4, site: 3, what: What::Killed },
            Event { round: rounds / 2, site: 4, what: What::Started },
            Event { round: 3 * rounds / 4, site: 3, what: What::Started },
        ];
        Ok(trial)
    })?;
    let relative = unsteady.relative_to(&steady);
    table.row([
        "4 that come and go".to_owned(),
        loss(mean(&unsteady.losses)),
        format!("{} (to 4 that stay)", percent(relative)),
        "-".to_owned(),
    ]);
    findings.push(Finding {
        experiment: "E6",
        relation:
            "a site killed for half of the run, one that joins in its middle: within 3 % of 4 that stay"
                .to_owned(),
        measured: percent(relative),
        holds: relative <= 1.03,
    });
    table.show("E6: deltas dropped, sites killed and added.", &work.path("E6.csv"))?;
    Chart {
        title: "E6: final held-out loss by deltas dropped, 10 sites",
        x: "% of deltas dropped",
        y: "nats per byte",
        log_x: false,
        log_y: false,
        series: vec![Series::new("10 sites", points)],
    }
    .draw(&work.path("E6.svg"))?;
    Ok(findings)
}
