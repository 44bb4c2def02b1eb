//! Sampling text from the model, with a generator of our own: one seed gives one text.

use std::ops::ControlFlow;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    LanguageModel,
    attention::{Attention, Cache},
    device::upload,
    error::{Doing, TrainerError},
    kernels,
};

/// How the next token is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0: always the likeliest token.
    pub temperature: f64,
    /// Draws among the likeliest tokens that together have at least this probability (Holtzman et al.,
    /// arXiv 1904.09751, sec. 3.1); 1: among all.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl LanguageModel {
    /// Continues `prompt` by up to `tokens_max` tokens, each handed to `on_token`, which may end it. Keys and
    /// values of what was read are kept, so that a token costs the model once. When the context is full, the
    /// model reads the latter half of it anew and forgets the rest.
    ///
    /// # Errors
    /// The prompt is empty or has tokens outside the vocabulary.
    pub fn generate(
        &self,
        prompt: &[i64],
        tokens_max: usize,
        sampling: Sampling,
        mut on_token: impl FnMut(i64) -> ControlFlow<()>,
    ) -> Result<(), TrainerError> {
        let mut generator = ChaCha8Rng::seed_from_u64(sampling.seed);
        let mut tokens = prompt.to_vec();
        let mut cache = Cache::default();
        let mut unread = 0;
        for _ in 0..tokens_max {
            if tokens.len() - unread + cache.length() as usize > self.context {
                cache = Cache::default();
                unread = tokens.len() - self.context.div_ceil(2);
            }
            let logits = self.next_logits(&tokens[unread..], &mut cache)?;
            unread = tokens.len();
            let token = draw(&logits, sampling, generator.random::<f64>());
            tokens.push(token as i64);
            if on_token(token as i64).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// The logits `[vocabulary]` of the token that follows those in `cache` and `tokens`, which are added to
    /// the cache. Both together fit the context.
    pub(super) fn next_logits(&self, tokens: &[i64], cache: &mut Cache) -> Result<Vec<f32>, TrainerError> {
        let _no_grad = tch::no_grad_guard();
        self.check_window(tokens.len())?;
        self.check_vocabulary(tokens)?;
        let new = tokens.len() as i64;
        let logits = upload(tokens, &[1, new], self.device)
            .and_then(|tokens| {
                let mut attention = Attention::following(cache, new, self.device)?;
                let last = self.model.hidden(&tokens, &mut attention)?.f_narrow(1, new - 1, 1)?;
                kernels::linear(&last, self.model.output(), None)
            })
            .doing("computing logits")?;
        self.read_logits(&logits, 1)
    }
}

/// The token that `uniform`, in [0, 1), falls on.
fn draw(logits: &[f32], sampling: Sampling, uniform: f64) -> usize {
    let likeliest = likeliest(logits);
    if sampling.temperature <= 0.0 {
        return likeliest;
    }
    let peak = f64::from(logits[likeliest]);
    let weight = |logit: &f32| ((f64::from(*logit) - peak) / sampling.temperature).exp();
    let weights: Vec<f64> = logits.iter().map(weight).collect();
    let total: f64 = weights.iter().sum();

    // Tokens below this weight have together less than what top-p leaves out: they need not be sorted.
    #[allow(clippy::cast_precision_loss)]
    let least = (1.0 - sampling.top_p) * total / weights.len() as f64;
    let mut order: Vec<usize> = (0..weights.len()).filter(|token| weights[*token] >= least).collect();
    // Likeliest first; equals in order, so that a draw does not depend on the sort.
    order.sort_unstable_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
    let mut kept = 0;
    let mut mass = 0.0;
    while kept < order.len() && (kept == 0 || mass < sampling.top_p * total) {
        mass += weights[order[kept]];
        kept += 1;
    }
    let mut rest = uniform * mass;
    for token in &order[..kept] {
        rest -= weights[*token];
        if rest < 0.0 {
            return *token;
        }
    }
    order[..kept].last().copied().unwrap_or(likeliest)
}

/// The token with the largest logit, the first of equals.
fn likeliest(logits: &[f32]) -> usize {
    let mut likeliest = 0;
    for (token, logit) in logits.iter().enumerate() {
        if logit.total_cmp(&logits[likeliest]).is_gt() {
            likeliest = token;
        }
    }
    likeliest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Probabilities 0.5, 0.3, 0.2.
    const LOGITS: [f32; 3] = [-1.203_973, -std::f32::consts::LN_2, -1.609_438];

    #[track_caller]
    fn check(temperature: f64, top_p: f64, expected: [usize; 4]) {
        let sampling = Sampling { temperature, top_p, seed: 0 };
        assert_eq!([0.0, 0.45, 0.7, 0.999].map(|uniform| draw(&LOGITS, sampling, uniform)), expected);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        check(1.0, 1.0, [1, 1, 0, 2]);
    }

    #[test]
    fn temperature_zero_takes_the_likeliest() {
        check(0.0, 1.0, [1, 1, 1, 1]);
    }

    #[test]
    fn of_equally_likely_tokens_the_first_is_taken() {
        let sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
        assert_eq!(draw(&[0.5, 2.0, -1.0, 2.0], sampling, 0.9), 1);
    }

    /// The definition, with every token sorted.
    fn draw_from_all(logits: &[f32], sampling: Sampling, uniform: f64) -> usize {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let peak = f64::from(logits[order[0]]);
        let weight = |token: &usize| ((f64::from(logits[*token]) - peak) / sampling.temperature).exp();
        let weights: Vec<f64> = order.iter().map(weight).collect();
        let total: f64 =
            logits.iter().map(|logit| ((f64::from(*logit) - peak) / sampling.temperature).exp()).sum();
        let mut masses = weights.iter().scan(0.0, |mass, weight| {
            *mass += weight;
            Some(*mass)
        });
        let kept =
            masses.position(|mass| mass >= sampling.top_p * total).map_or(order.len(), |last| last + 1);
        let mut rest = uniform * weights[..kept].iter().sum::<f64>();
        let drawn = weights[..kept].iter().position(|weight| {
            rest -= weight;
            rest < 0.0
        });
        order[drawn.unwrap_or(kept - 1)]
    }

    proptest! {
        #[test]
        fn what_is_not_sorted_is_never_drawn(
            logits in prop::collection::vec(-8.0f32..8.0, 1..200),
            temperature in 0.1f64..3.0,
            top_p in 0.0f64..=1.0,
            uniform in 0.0f64..1.0,
        ) {
            let sampling = Sampling { temperature, top_p, seed: 0 };
            prop_assert_eq!(draw(&logits, sampling, uniform), draw_from_all(&logits, sampling, uniform));
        }
    }

    #[test]
    fn top_p_draws_among_the_likeliest_only() {
        check(1.0, 0.4, [1, 1, 1, 1]);
        check(1.0, 0.6, [1, 1, 0, 0]);
        check(1.0, 0.0, [1, 1, 1, 1]);
    }
}
