//! `bench`: what this machine makes of a run's training step, on random tokens.

use std::{
    fs,
    io::BufRead,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::Args;
use consort_common::{
    model::{Architecture, TensorSpec},
    spec::{Precision, RunSpec},
    units,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::DeviceArguments;
use crate::trainer::{Device, Phases, Trainer, describe, peak_flops, peak_memory};

/// Steps before the first measurement, at least: memory is first touched, kernels are chosen.
const WARMUP_STEPS: u64 = 2;

/// Arguments of `bench`.
#[derive(Debug, Args)]
pub(super) struct BenchArguments {
    /// The run's specification, as given to `consort runs create`
    specification: PathBuf,
    /// Optimizer steps of a measurement
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Print one JSON document per measurement instead of text
    #[arg(long)]
    json: bool,
    /// Measure once for each line on standard input, to take turns with another program
    #[arg(long)]
    on_line: bool,
    #[command(flatten)]
    device: DeviceArguments,
}

/// One measurement.
struct Measurement {
    steps: u64,
    elapsed: Duration,
    /// Of one more step.
    phases: Phases,
    loss: f32,
    sequences_at_once: usize,
}

impl BenchArguments {
    pub(super) fn run(&self) -> Result<()> {
        let toml = fs::read_to_string(&self.specification)
            .with_context(|| format!("cannot read the specification {}", self.specification.display()))?;
        let spec = RunSpec::parse(&toml)?;
        let device = self.device.open()?;
        let steps_all = u64::MAX; // the schedule is not what is measured
        let mut trainer =
            Trainer::new(&spec.model, &spec.training, steps_all, /* end_of_text: */ 0, device)?;
        trainer.load(&spec.model.manifest().initialise(spec.seed))?;
        let mut tokens = RandomTokens::new(&spec);
        warm_up(&mut trainer, &mut tokens)?;
        if self.on_line {
            for line in std::io::stdin().lock().lines() {
                line?;
                self.print(&spec, device, &measure(&mut trainer, &mut tokens, self.steps)?)?;
            }
        } else {
            self.print(&spec, device, &measure(&mut trainer, &mut tokens, self.steps)?)?;
        }
        Ok(())
    }

    #[allow(clippy::cast_precision_loss)]
    fn print(&self, spec: &RunSpec, device: Device, measurement: &Measurement) -> Result<()> {
        let training = &spec.training;
        let tokens_per_step = u64::from(training.batch_size) * u64::from(training.sequence_length);
        let seconds = measurement.elapsed.as_secs_f64();
        let step_seconds = seconds / measurement.steps as f64;
        let tokens_per_second = tokens_per_step as f64 / step_seconds;
        let flops = flops_per_token(&spec.model, training.sequence_length) * tokens_per_second;
        let utilisation = peak_flops(device, training.precision == Precision::Bf16).map(|peak| flops / peak);
        let Phases { forward, head, backward, update } = measurement.phases;
        let share =
            |phase: Duration| phase.as_secs_f64() / (forward + head + backward + update).as_secs_f64();
        let peak_memory_bytes = peak_memory(device);
        if self.json {
            let result = json!({
                "device": describe(device),
                "parameters": spec.model.manifest().parameters(),
                "tokens_per_second": tokens_per_second,
                "step_seconds": step_seconds,
                "sequences_at_once": measurement.sequences_at_once,
                "flops_per_second": flops,
                "model_flops_utilisation": utilisation,
                "forward_share": share(forward),
                "head_share": share(head),
                "backward_share": share(backward),
                "update_share": share(update),
                "peak_memory_bytes": peak_memory_bytes,
                "loss": measurement.loss,
            });
            println!("{result}");
            return Ok(());
        }
        println!("device          {}", describe(device));
        println!("model           {} parameters", units::count(spec.model.manifest().parameters()));
        println!(
            "step            {step_seconds:.3} s, {tokens_per_step} tokens, {} sequences at once",
            measurement.sequences_at_once
        );
        println!("speed           {tokens_per_second:.0} tokens/s, {:.1} GFLOP/s", flops / 1e9);
        if let Some(utilisation) = utilisation {
            println!("utilisation     {:.1} % of the device's peak (MFU)", utilisation * 100.0);
        }
        println!(
            "where it goes   blocks forward {:.0} %, head and loss {:.0} %, blocks backward {:.0} %, update {:.0} %",
            share(forward) * 100.0,
            share(head) * 100.0,
            share(backward) * 100.0,
            share(update) * 100.0
        );
        if let Some(bytes) = peak_memory_bytes {
            let whose = if device.is_cuda() { "the GPU" } else { "the host" };
            println!("peak memory     {} of {whose}", units::bytes(bytes));
        }
        Ok(())
    }
}

/// Steps until a GPU has found how many sequences it takes at once.
fn warm_up(trainer: &mut Trainer, tokens: &mut RandomTokens) -> Result<()> {
    for step in 1.. {
        let sequences = trainer.sequences_at_once();
        trainer.step(&tokens.batch(), 0, &|| false)?;
        if step >= WARMUP_STEPS && trainer.sequences_at_once() == sequences {
            break;
        }
    }
    trainer.take_results()?;
    Ok(())
}

/// Times some steps, and then the parts of another, since to time parts is to wait for the device after each.
fn measure(trainer: &mut Trainer, tokens: &mut RandomTokens, steps: u64) -> Result<Measurement> {
    let began = Instant::now();
    for _ in 0..steps {
        trainer.step(&tokens.batch(), 0, &|| false)?;
    }
    // Waits for the device.
    let loss = trainer.take_results()?.last().map_or(f32::NAN, |result| result.loss);
    let elapsed = began.elapsed();
    trainer.measure_phases();
    trainer.step(&tokens.batch(), 0, &|| false)?;
    let phases = trainer.take_phases();
    trainer.take_results()?;
    Ok(Measurement { steps, elapsed, phases, loss, sequences_at_once: trainer.sequences_at_once() })
}

struct RandomTokens {
    random: ChaCha8Rng,
    count: usize,
    vocabulary: i64,
}

impl RandomTokens {
    fn new(spec: &RunSpec) -> Self {
        let count = spec.training.batch_size as usize * (spec.training.sequence_length as usize + 1);
        let vocabulary = spec.model.vocab_size() as i64;
        Self { random: ChaCha8Rng::seed_from_u64(spec.seed), count, vocabulary }
    }

    fn batch(&mut self) -> Vec<i64> {
        (0..self.count).map(|_| self.random.random_range(0..self.vocabulary)).collect()
    }
}

/// Floating-point operations that training takes per token: 6 per parameter of a matrix product and 12 per layer,
/// width and token of the context (Chowdhery et al., arXiv 2204.02311, appendix B). What causal attention could
/// leave out is counted.
#[allow(clippy::cast_precision_loss)]
fn flops_per_token(architecture: &Architecture, sequence_length: u32) -> f64 {
    let (layers, width) = match architecture {
        Architecture::Llama(config) => (config.num_hidden_layers, config.hidden_size),
        Architecture::Gpt2(config) => (config.n_layer, config.n_embd),
        Architecture::Mpt(config) => (config.n_layers, config.d_model),
    };
    let manifest = architecture.manifest();
    let blocks = manifest.tensors().iter().filter(|tensor| tensor.is_hidden_matrix());
    let blocks: usize = blocks.map(TensorSpec::parameters).sum();
    let multiplied = blocks + architecture.vocab_size() * width;
    6.0 * multiplied as f64 + 12.0 * (layers * width) as f64 * f64::from(sequence_length)
}

#[cfg(test)]
mod tests {
    use consort_common::model::LlamaConfig;

    use super::*;

    #[test]
    fn operations_per_token_are_those_counted_by_hand() {
        let config = LlamaConfig {
            vocab_size: 10,
            hidden_size: 4,
            intermediate_size: 6,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            ..LlamaConfig::default()
        };
        // Per layer: query and output 4 x 4, key and value 2 x 4, three of 6 x 4; the head 10 x 4.
        let products = 2 * (2 * 16 + 2 * 8 + 3 * 24) + 40;
        let expected = f64::from(6 * products + 12 * 2 * 4 * 8);
        for tie_word_embeddings in [true, false] {
            let architecture = Architecture::Llama(LlamaConfig { tie_word_embeddings, ..config.clone() });
            assert_eq!(flops_per_token(&architecture, 8), expected);
        }
    }
}
