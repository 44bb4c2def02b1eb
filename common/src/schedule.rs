//! Learning-rate schedules: the rate as a function of the run's cumulative step, which the aggregator
//! holds. A schedule never restarts with a round.

use serde::{Deserialize, Serialize};

/// Shape of the learning rate over the run. Every shape begins with a linear warm-up: step t of W, from 0,
/// has the fraction from + (top - from) (t + 1) / W of the peak.
///
/// A run that goes on from another's checkpoint has steps, and so phases, of its own. Its rate is warmed up
/// again and decays again (re-warming and re-decaying, Ibrahim et al., arXiv 2403.08763, sec. 4.1) with
/// `warmup_steps` from the fraction `warmup_from` at which the other run ended; or it stays there, with
/// [`Schedule::Constant`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Schedule {
    /// One rate throughout, after the warm-up.
    Constant {
        /// Steps of linear warm-up.
        #[serde(default)]
        warmup_steps: u64,
        /// Where the warm-up begins, as a fraction of the peak.
        #[serde(default)]
        warmup_from: f64,
        /// The rate, as a fraction of the peak.
        #[serde(default = "whole")]
        fraction: f64,
    },
    /// Warm-up, then half a cosine down to `final_fraction` of the peak at `total_steps` (Loshchilov
    /// and Hutter, arXiv 1608.03983, eq. 5, one period), and that rate from there on.
    Cosine {
        /// Steps of linear warm-up.
        #[serde(default)]
        warmup_steps: u64,
        /// Where the warm-up begins, as a fraction of the peak.
        #[serde(default)]
        warmup_from: f64,
        /// Step at which the final rate is reached; absent: the run's last step.
        #[serde(default)]
        total_steps: Option<u64>,
        /// Final rate as a fraction of the peak.
        #[serde(default = "tenth")]
        final_fraction: f64,
    },
    /// Warm-up, stable, then decay to `final_fraction` by 1 - sqrt over the last `decay_steps`
    /// (Hägele et al., arXiv 2405.18392, sec. 3).
    WarmupStableDecay {
        /// Steps of linear warm-up.
        #[serde(default)]
        warmup_steps: u64,
        /// Where the warm-up begins, as a fraction of the peak.
        #[serde(default)]
        warmup_from: f64,
        /// Steps of the final decay.
        decay_steps: u64,
        /// Step at which the final rate is reached; absent: the run's last step.
        #[serde(default)]
        total_steps: Option<u64>,
        /// Final rate as a fraction of the peak.
        #[serde(default)]
        final_fraction: f64,
    },
    /// The infinite schedule (Ibrahim et al., arXiv 2403.08763, sec. 7.4), whose constant phase goes on for
    /// as long as there is text, and from which any number of annealed models can branch off. With c =
    /// `constant_fraction`, f = `final_fraction` and p the share of the phase that is over:
    ///
    /// - cool-down, once, after the warm-up: c + (1 - c) (1 + cos(pi p)) / 2;
    /// - constant: c;
    /// - annealing, if asked for, over the last steps: c (f / c)^p, and f from there on.
    Infinite {
        /// Steps of linear warm-up.
        #[serde(default)]
        warmup_steps: u64,
        /// Where the warm-up begins, as a fraction of the peak.
        #[serde(default)]
        warmup_from: f64,
        /// Steps of the cool-down. 0 with a run that goes on in the constant phase.
        #[serde(default)]
        cooldown_steps: u64,
        /// The constant rate as a fraction of the peak.
        #[serde(default = "constant_fraction")]
        constant_fraction: f64,
        /// Steps of the annealing; 0: none.
        #[serde(default)]
        annealing_steps: u64,
        /// Step at which the annealing ends; absent: the run's last step.
        #[serde(default)]
        total_steps: Option<u64>,
        /// Rate after the annealing as a fraction of the peak.
        #[serde(default = "tenth")]
        final_fraction: f64,
    },
}

fn whole() -> f64 {
    1.0
}

/// Half-way between the peak and the tenth of it that annealing leads to.
fn constant_fraction() -> f64 {
    0.55
}

fn tenth() -> f64 {
    0.1
}

impl Default for Schedule {
    fn default() -> Self {
        Self::Cosine { warmup_steps: 0, warmup_from: 0.0, total_steps: None, final_fraction: tenth() }
    }
}

impl Schedule {
    /// The factor on the peak learning rate for the step numbered `step` from 0, in a run of
    /// `run_steps` steps.
    #[allow(clippy::cast_precision_loss)]
    pub fn factor(&self, step: u64, run_steps: u64) -> f64 {
        let (warmup_steps, from) = self.warmup();
        if step < warmup_steps {
            return from + (self.top() - from) * ((step + 1) as f64 / warmup_steps as f64);
        }
        let since_warmup = step - warmup_steps;
        let total = self.total_steps().unwrap_or(run_steps);
        // The share that is over of a phase that ends at `total`.
        let last = |steps: u64| progress(step.saturating_sub(total.saturating_sub(steps)), steps);
        match *self {
            Self::Constant { fraction, .. } => fraction,
            Self::Cosine { final_fraction, .. } => {
                cosine(1.0, final_fraction, progress(since_warmup, total.saturating_sub(warmup_steps)))
            }
            Self::WarmupStableDecay { decay_steps, final_fraction, .. } => {
                final_fraction + (1.0 - final_fraction) * (1.0 - libm::sqrt(last(decay_steps)))
            }
            Self::Infinite { cooldown_steps, constant_fraction, annealing_steps, final_fraction, .. } => {
                if annealing_steps > 0 && step >= total.saturating_sub(annealing_steps) {
                    constant_fraction * libm::pow(final_fraction / constant_fraction, last(annealing_steps))
                } else {
                    cosine(1.0, constant_fraction, progress(since_warmup, cooldown_steps))
                }
            }
        }
    }

    /// Steps of the warm-up, and the fraction of the peak that it begins at.
    pub(crate) fn warmup(&self) -> (u64, f64) {
        match *self {
            Self::Constant { warmup_steps, warmup_from, .. }
            | Self::Cosine { warmup_steps, warmup_from, .. }
            | Self::WarmupStableDecay { warmup_steps, warmup_from, .. }
            | Self::Infinite { warmup_steps, warmup_from, .. } => (warmup_steps, warmup_from),
        }
    }

    /// Step at which the last phase ends, if the schedule says so.
    pub(crate) fn total_steps(&self) -> Option<u64> {
        match *self {
            Self::Constant { .. } => None,
            Self::Cosine { total_steps, .. }
            | Self::WarmupStableDecay { total_steps, .. }
            | Self::Infinite { total_steps, .. } => total_steps,
        }
    }

    /// Where the warm-up ends, as a fraction of the peak.
    fn top(&self) -> f64 {
        match *self {
            Self::Constant { fraction, .. } => fraction,
            _ => 1.0,
        }
    }
}

/// Half a cosine from `begin` to `end`.
fn cosine(begin: f64, end: f64, progress: f64) -> f64 {
    end + (begin - end) * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress))
}

/// `done / total`, at most 1.
#[allow(clippy::cast_precision_loss)]
fn progress(done: u64, total: u64) -> f64 {
    if done >= total { 1.0 } else { done as f64 / total as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(schedule: &Schedule, expected: &[(u64, f64)]) {
        for (step, factor) in expected {
            let actual = schedule.factor(*step, 100);
            assert!((actual - factor).abs() < 1e-12, "step {step}: {actual}, not {factor}");
        }
    }

    /// A schedule as a specification writes it.
    fn schedule(toml: &str) -> Schedule {
        toml::from_str(toml).unwrap()
    }

    #[test]
    fn constant_warms_up_and_stays() {
        let constant = schedule("kind = 'constant'\nwarmup_steps = 4");
        check(&constant, &[(0, 0.25), (3, 1.0), (4, 1.0), (1_000, 1.0)]);
        check(&schedule("kind = 'constant'"), &[(0, 1.0)]);
    }

    #[test]
    fn cosine_reaches_its_floor_at_the_end_of_the_run_and_stays() {
        let cosine = schedule("kind = 'cosine'\nwarmup_steps = 10");
        check(&cosine, &[(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.55), (100, 0.1), (5_000, 0.1)]);
        let shorter = schedule("kind = 'cosine'\ntotal_steps = 50\nfinal_fraction = 0");
        check(&shorter, &[(25, 0.5), (50, 0.0)]);
    }

    #[test]
    fn stable_then_decays_by_one_minus_the_root() {
        let stable = schedule("kind = 'warmup-stable-decay'\nwarmup_steps = 10\ndecay_steps = 20");
        check(&stable, &[(4, 0.5), (10, 1.0), (80, 1.0), (85, 0.5), (100, 0.0), (200, 0.0)]);
    }

    #[test]
    fn infinite_cools_down_stays_and_anneals_when_asked() {
        let forever = "kind = 'infinite'\nwarmup_steps = 10\ncooldown_steps = 20\nconstant_fraction = 0.4\n";
        // Half a cosine from 1 to 0.4: its middle is 0.7, a quarter of its way 0.7 + 0.3 / sqrt(2).
        let quarter = 0.7 + 0.3 * std::f64::consts::FRAC_1_SQRT_2;
        let until_constant = [(4, 0.5), (9, 1.0), (10, 1.0), (15, quarter), (20, 0.7), (30, 0.4)];
        check(&schedule(forever), &until_constant);
        check(&schedule(forever), &[(60, 0.4), (99, 0.4), (100, 0.4), (1_000_000, 0.4)]);
        let annealed = schedule(&format!("{forever}annealing_steps = 40\nfinal_fraction = 0.1"));
        check(&annealed, &until_constant);
        // Geometric from 0.4 to 0.1: half of it at half the way.
        check(&annealed, &[(59, 0.4), (60, 0.4), (80, 0.2), (100, 0.1), (1_000, 0.1)]);
        let annealed_alone = schedule("kind = 'infinite'\nannealing_steps = 100\nconstant_fraction = 0.4");
        check(&annealed_alone, &[(0, 0.4), (50, 0.2), (100, 0.1)]);
        let goes_on = schedule("kind = 'infinite'\nconstant_fraction = 0.4");
        check(&goes_on, &[(0, 0.4), (500, 0.4)]);
    }

    #[test]
    fn a_run_that_goes_on_is_warmed_up_from_where_the_other_ended() {
        let warmup = "warmup_steps = 10\nwarmup_from = 0.1\n";
        // 0.1 + 0.9 (t + 1) / 10.
        let rewarmed = [(0, 0.19), (4, 0.55), (9, 1.0), (10, 1.0)];
        let cosine = schedule(&format!("kind = 'cosine'\n{warmup}"));
        check(&cosine, &rewarmed);
        check(&cosine, &[(55, 0.55), (100, 0.1)]);
        // Decaying by 1 - sqrt from the end of the warm-up on: at a ninth of 90 steps by a third.
        let root = schedule(&format!("kind = 'warmup-stable-decay'\ndecay_steps = 90\n{warmup}"));
        check(&root, &rewarmed);
        check(&root, &[(20, 2.0 / 3.0), (50, 1.0 / 3.0), (100, 0.0)]);
        check(&schedule(&format!("kind = 'infinite'\n{warmup}constant_fraction = 0.4")), &rewarmed[..3]);
        let constant = schedule(&format!("kind = 'constant'\n{warmup}fraction = 0.3"));
        check(&constant, &[(0, 0.12), (4, 0.2), (9, 0.3), (10, 0.3), (1_000, 0.3)]);
        check(&schedule("kind = 'constant'\nfraction = 0.1"), &[(0, 0.1), (1_000, 0.1)]);
    }
}
