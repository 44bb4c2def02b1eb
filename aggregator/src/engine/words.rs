//! The run's situation in words, for people.

use consort_common::{
    ids::SiteName,
    units::{UnixMs, duration_ms},
};

use super::{Evaluating, Phase, Plan, Reducing, Run, RunStatus, Training};

/// Most names that a sentence lists.
const NAMES_MAX: usize = 6;

impl Run {
    /// What the run is waiting for.
    pub fn waiting_for(&self, plan: &Plan, now: UnixMs) -> String {
        match &self.state.status {
            RunStatus::Created => return "an operator to start the run".to_owned(),
            RunStatus::Paused => return "an operator to resume the run".to_owned(),
            RunStatus::Finished => return "nothing: the run is finished".to_owned(),
            RunStatus::Aborted { reason } => return format!("nothing: the run was aborted ({reason})"),
            RunStatus::Active => {}
        }
        match &self.state.phase {
            Phase::Waiting => sites_to_begin(self, plan),
            Phase::Training(training) => self.deltas(plan, training, now),
            Phase::Reducing(reducing) => reduction(reducing, now),
            Phase::Evaluating(evaluating) => self.evaluations(evaluating, now),
            Phase::Done => "nothing: the run is finished".to_owned(),
        }
    }

    fn deltas(&self, plan: &Plan, training: &Training, now: UnixMs) -> String {
        let mut remarks = vec![format!("{} of {} in", self.state.in_hand(plan), training.goal(plan))];
        let missing = training.wanted.saturating_sub(training.selected());
        if missing > 0 && plan.buffer().is_none() {
            remarks.push(format!("{} to join", count(missing, "more site", "more sites")));
        }
        let away: Vec<&SiteName> =
            training.working().filter(|site| !self.roster.ready.contains_key(*site)).collect();
        if !away.is_empty() {
            remarks.push(format!("not connected: {}", names(away)));
        }
        if training.attempt > 1 {
            remarks.push(format!("attempt {}", training.attempt));
        }
        if let Some(deadline_ms) = self.deadline_ms() {
            remarks.push(format!("deadline in {}", duration_ms(deadline_ms.saturating_sub(now))));
        }
        if !self.state.behind.is_empty() {
            remarks.push(format!("at work on an earlier round: {}", names(self.state.behind.keys())));
        }
        let remarks = remarks.join("; ");
        if training.working().next().is_none() {
            return format!("sites to take part in round {} ({remarks})", training.round);
        }
        format!("deltas of {} ({remarks})", names(training.working()))
    }

    fn evaluations(&self, evaluating: &Evaluating, now: UnixMs) -> String {
        let version = self.state.version;
        let left = duration_ms(evaluating.deadline_ms.saturating_sub(now));
        format!("held-out loss of version {version} from {} (at most {left} more)", names(self.unheard()))
    }
}

/// How many sites a round lacks before it can begin.
pub(super) fn sites_to_begin(run: &Run, plan: &Plan) -> String {
    let (ready, needed) = (run.roster.ready.len(), plan.sites_to_begin());
    let missing = count(needed.saturating_sub(ready), "more site", "more sites");
    format!(
        "{missing} to connect and get ready ({ready} of {needed} {})",
        if ready == 1 { "is" } else { "are" }
    )
}

fn reduction(reducing: &Reducing, now: UnixMs) -> String {
    match reducing.retry_at_ms {
        None => format!("reduction of round {}", reducing.round),
        Some(retry_at_ms) => format!(
            "another try to reduce round {} in {} (it failed {})",
            reducing.round,
            duration_ms(retry_at_ms.saturating_sub(now)),
            count(reducing.failures as usize, "time", "times")
        ),
    }
}

/// "1 site", "2 sites".
pub(super) fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

/// "bank", "bank and clinic", "bank, clinic and lab", "a, b, c, d, e, f and 3 others".
pub(super) fn names<'a>(sites: impl IntoIterator<Item = &'a SiteName>) -> String {
    let sites: Vec<&str> = sites.into_iter().map(SiteName::as_str).collect();
    match sites.as_slice() {
        [] => "nobody".to_owned(),
        [one] => (*one).to_owned(),
        [first @ .., last] if sites.len() <= NAMES_MAX => format!("{} and {last}", first.join(", ")),
        [..] => {
            let others = count(sites.len() - NAMES_MAX, "other", "others");
            format!("{} and {others}", sites[..NAMES_MAX].join(", "))
        }
    }
}
