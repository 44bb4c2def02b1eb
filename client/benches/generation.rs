//! What kept keys and values are worth to generation: tokens per second with them, beside reading the whole text anew
//! for each token. Prints a table.
//!
//! `cargo bench --profile dev -p consort-client --bench generation [-- THREADS]`. A model of 7 million parameters with
//! random weights continues one token by 64 and by 256, always with the likeliest. `CONSORT_TEST_DEVICE`
//! chooses the device.

use std::{
    error::Error,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use consort_client::trainer::{
    DeviceChoice, LanguageModel, Sampling, describe, set_threads, set_up_libraries,
};
use consort_common::model::{Architecture, LlamaConfig};

const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };

fn main() -> Result<(), Box<dyn Error>> {
    set_up_libraries();
    // cargo hands its own arguments on.
    set_threads(std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(2));
    let name = std::env::var("CONSORT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    let device = name.parse::<DeviceChoice>()?.open()?;
    let architecture = Architecture::Llama(LlamaConfig {
        vocab_size: 4096,
        hidden_size: 288,
        intermediate_size: 768,
        num_hidden_layers: 6,
        num_attention_heads: 6,
        num_key_value_heads: 6,
        max_position_embeddings: 1024,
        ..LlamaConfig::default()
    });
    let flat = architecture.manifest().initialise(1);
    let model = LanguageModel::from_flat(&architecture, &flat, device)?;
    println!("{}, {} parameters, from one token on", describe(device), flat.len());
    println!("              tokens/s");
    println!("tokens     kept    anew    ratio");
    let _ = (kept(&model, 16)?, anew(&model, 16)?); // memory is first touched, kernels are chosen
    for tokens in [64, 256] {
        let (kept, anew) = (kept(&model, tokens)?, anew(&model, tokens)?);
        let speed = |time: Duration| tokens as f64 / time.as_secs_f64();
        let ratio = speed(kept) / speed(anew);
        println!("{tokens:6}  {:7.0} {:7.0}  {ratio:7.1}", speed(kept), speed(anew));
    }
    Ok(())
}

/// Time that it takes to continue a token by so many others.
fn kept(model: &LanguageModel, tokens: usize) -> Result<Duration, Box<dyn Error>> {
    let began = Instant::now();
    model.generate(&[1], tokens, GREEDY, |_| ControlFlow::Continue(()))?;
    Ok(began.elapsed())
}

/// The same where every token is the first one behind a prompt that is all the text so far.
fn anew(model: &LanguageModel, tokens: usize) -> Result<Duration, Box<dyn Error>> {
    let began = Instant::now();
    let mut text = vec![1];
    for _ in 0..tokens {
        let mut next = None;
        model.generate(&text, 1, GREEDY, |token| {
            next = Some(token);
            ControlFlow::Continue(())
        })?;
        text.extend(next);
    }
    Ok(began.elapsed())
}
