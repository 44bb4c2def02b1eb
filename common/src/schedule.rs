//! Learning-rate schedules: the rate as a function of the run's cumulative step, which the aggregator
//! holds. A schedule never restarts with a round.

use serde::{Deserialize, Serialize};

/// Shape of the learning rate over the run. Warm-up rises linearly to the peak rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Schedule {
    /// The peak rate throughout, after the warm-up.
    Constant {
        /// Steps of linear warm-up.
        #[serde(default)]
        warmup_steps: u64,
    },
    /// Warm-up, then half a cosine down to `final_fraction` of the peak at `total_steps` (Loshchilov
    /// and Hutter, arXiv 1608.03983, eq. 5, one period), and that rate from there on.
    Cosine {
        /// Steps of linear warm-up.
        #[serde(default)]
        warmup_steps: u64,
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
        /// Steps of the final decay.
        decay_steps: u64,
        /// Step at which the final rate is reached; absent: the run's last step.
        #[serde(default)]
        total_steps: Option<u64>,
        /// Final rate as a fraction of the peak.
        #[serde(default)]
        final_fraction: f64,
    },
}

fn tenth() -> f64 {
    0.1
}

impl Default for Schedule {
    fn default() -> Self {
        Self::Cosine { warmup_steps: 0, total_steps: None, final_fraction: tenth() }
    }
}

impl Schedule {
    /// The factor on the peak learning rate for the step numbered `step` from 0, in a run of
    /// `run_steps` steps.
    #[allow(clippy::cast_precision_loss)]
    pub fn factor(&self, step: u64, run_steps: u64) -> f64 {
        let warmup_steps = match self {
            Self::Constant { warmup_steps }
            | Self::Cosine { warmup_steps, .. }
            | Self::WarmupStableDecay { warmup_steps, .. } => *warmup_steps,
        };
        if step < warmup_steps {
            return (step + 1) as f64 / warmup_steps as f64;
        }
        match self {
            Self::Constant { .. } => 1.0,
            Self::Cosine { total_steps, final_fraction, .. } => {
                let total = total_steps.unwrap_or(run_steps);
                let progress = progress(step - warmup_steps, total.saturating_sub(warmup_steps));
                final_fraction
                    + (1.0 - final_fraction) * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress))
            }
            Self::WarmupStableDecay { decay_steps, total_steps, final_fraction, .. } => {
                let decay_begins = total_steps.unwrap_or(run_steps).saturating_sub(*decay_steps);
                let progress = progress(step.saturating_sub(decay_begins), *decay_steps);
                final_fraction + (1.0 - final_fraction) * (1.0 - libm::sqrt(progress))
            }
        }
    }
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

    #[test]
    fn constant_warms_up_and_stays() {
        check(&Schedule::Constant { warmup_steps: 4 }, &[(0, 0.25), (3, 1.0), (4, 1.0), (1_000, 1.0)]);
        check(&Schedule::Constant { warmup_steps: 0 }, &[(0, 1.0)]);
    }

    #[test]
    fn cosine_reaches_its_floor_at_the_end_of_the_run_and_stays() {
        let cosine = Schedule::Cosine { warmup_steps: 10, total_steps: None, final_fraction: 0.1 };
        check(&cosine, &[(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.55), (100, 0.1), (5_000, 0.1)]);
        let shorter = Schedule::Cosine { warmup_steps: 0, total_steps: Some(50), final_fraction: 0.0 };
        check(&shorter, &[(25, 0.5), (50, 0.0)]);
    }

    #[test]
    fn stable_then_decays_by_one_minus_the_root() {
        let stable = Schedule::WarmupStableDecay {
            warmup_steps: 10,
            decay_steps: 20,
            total_steps: None,
            final_fraction: 0.0,
        };
        check(&stable, &[(4, 0.5), (10, 1.0), (80, 1.0), (85, 0.5), (100, 0.0), (200, 0.0)]);
    }
}
