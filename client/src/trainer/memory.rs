//! What training will take of memory, sketched before it begins.

use consort_common::{
    model::Architecture,
    spec::{Precision, TrainingSpec},
};
use tch::Device;

use super::{kernels::logits_max, micro_batch::sequences_cpu};

const FLOAT: u64 = 4;

/// Device memory that training needs, in bytes: parameters, gradient and two moments in fp32, and what a
/// micro-batch keeps for its backward pass, the masks of attention included. An estimate, for a check before a
/// run, beside the 0.1 GB that libtorch itself takes.
///
/// On the CPU, models of 0.8 to 13 million parameters with 2,048 and 8,192 tokens took between 0.9 and 1.2 of it;
/// LLaMA and MPT with sequences of 2,048, with documents apart and not, between 1.2 and 1.3. On an H100 in bf16, LLaMA
/// with 124, 360 and 1,320 million parameters and GPT-2 with 124, with 8,192 and 16,384 tokens, took between 0.91 and
/// 0.99 of it. A GPU that finds `micro_batch_size` by itself begins with one sequence. On a GPU, in fp32 or with a
/// mask, keys and values that serve a group of heads are repeated for each of its heads, up to 2 x heads x head width
/// floats per token and block that are not counted.
pub fn memory_bytes_needed(architecture: &Architecture, training: &TrainingSpec, device: Device) -> u64 {
    let parameters = architecture.manifest().parameters();
    let state = 4 * parameters;
    // Per token: inputs and outputs of norms, projections, attention and residual sums, and the wide ones of
    // the feed-forward part; LLaMA's norms and its gate keep more of them.
    let blocks = match architecture {
        Architecture::Llama(config) => {
            config.num_hidden_layers * (17 * config.hidden_size + 5 * config.intermediate_size)
        }
        Architecture::Gpt2(config) => config.n_layer * (14 * config.n_embd + 2 * config.inner()),
        Architecture::Mpt(config) => config.n_layers * 22 * config.d_model,
    };
    let micro_batch = match training.micro_batch_size as usize {
        0 if device.is_cuda() => 1,
        0 => sequences_cpu(training),
        given => given,
    };
    let tokens = micro_batch as u64 * u64::from(training.sequence_length);
    let kept = tokens * blocks as u64;
    let bf16 = training.precision == Precision::Bf16;
    // A GPU's kernels keep less of it, in bf16 most of it in two bytes.
    let kept_bytes = match (device.is_cuda(), bf16) {
        (false, _) => FLOAT * kept,
        (true, false) => 3 * kept,
        (true, true) => 7 * kept / 4,
    };
    // The logits that exist at once, their logarithms, and in bf16 a copy in fp32 between them.
    let logits_bytes = if device.is_cuda() {
        let logits = (tokens * architecture.vocab_size() as u64).min(logits_max(device) as u64);
        logits * if bf16 { 10 } else { 8 }
    } else {
        0
    };
    let rounded = if bf16 { 2 * parameters } else { 0 };
    FLOAT * state
        + kept_bytes
        + logits_bytes
        + rounded
        + mask_bytes(architecture, training, micro_batch as u64)
}

/// What the masks of attention take, which grow with the square of the sequence: one for all blocks, in the precision
/// of the scores, and what it is made of. Scores themselves are never kept.
fn mask_bytes(architecture: &Architecture, training: &TrainingSpec, micro_batch: u64) -> u64 {
    let square = u64::from(training.sequence_length).pow(2);
    let rounded = |floats: u64| if training.precision == Precision::Bf16 { 2 * floats } else { 0 };
    let documents = if training.document_mask { micro_batch * square } else { 0 };
    let Architecture::Mpt(config) = architecture else {
        return FLOAT * documents + rounded(documents);
    };
    // The biases of ALiBi stay from step to step; in every sequence, those of its documents are added to them.
    let biases = config.n_heads as u64 * square;
    let of_sequences = config.n_heads as u64 * documents;
    FLOAT * (biases + of_sequences) + rounded(biases.max(of_sequences))
}

/// Host memory that the copy for a checkpoint takes while it is written, in bytes: parameters and two moments
/// in fp32. On a CPU it comes on top of [`memory_bytes_needed`].
pub fn checkpoint_bytes_needed(architecture: &Architecture) -> u64 {
    3 * size_of::<f32>() as u64 * architecture.manifest().parameters()
}

#[cfg(test)]
mod tests {
    use consort_common::model::{Gpt2Config, LlamaConfig, MptConfig};

    use super::*;

    fn training(document_mask: bool, precision: Precision) -> TrainingSpec {
        let sizes = TrainingSpec { batch_size: 8, micro_batch_size: 2, ..TrainingSpec::default() };
        TrainingSpec { sequence_length: 2048, document_mask, precision, ..sizes }
    }

    #[test]
    fn masks_count_with_the_square_of_the_sequence() {
        const SQUARE: u64 = 2048 * 2048;
        let llama =
            Architecture::Llama(LlamaConfig { max_position_embeddings: 2048, ..LlamaConfig::default() });
        let mpt = Architecture::Mpt(MptConfig { max_seq_len: 2048, n_heads: 4, ..MptConfig::default() });
        for (architecture, document_mask, precision, bytes_per_pair) in [
            (&llama, false, Precision::Fp32, 0),
            // One in fp32 for each of two sequences.
            (&llama, true, Precision::Fp32, 2 * 4),
            (&llama, true, Precision::Bf16, 2 * (4 + 2)),
            // One for each of four heads.
            (&mpt, false, Precision::Fp32, 4 * 4),
            (&mpt, false, Precision::Bf16, 4 * (4 + 2)),
            // One for each head, and one for each head and sequence.
            (&mpt, true, Precision::Fp32, 4 * 4 + 8 * 4),
            (&mpt, true, Precision::Bf16, 4 * 4 + 8 * (4 + 2)),
        ] {
            let training = training(document_mask, precision);
            assert_eq!(mask_bytes(architecture, &training, 2), bytes_per_pair * SQUARE, "{training:?}");
            let unmasked = TrainingSpec { document_mask: false, ..training.clone() };
            let of = |training| memory_bytes_needed(architecture, training, Device::Cpu);
            let more = of(&training) - of(&unmasked);
            let mask = mask_bytes(architecture, &training, 2) - mask_bytes(architecture, &unmasked, 2);
            assert_eq!(more, mask, "it is part of what is needed");
        }
    }

    #[test]
    fn a_gpu_needs_about_what_was_taken_of_an_h100() {
        let llama = |hidden_size, intermediate_size, num_hidden_layers| {
            Architecture::Llama(LlamaConfig {
                vocab_size: 50257,
                hidden_size,
                intermediate_size,
                num_hidden_layers,
                num_attention_heads: 16,
                num_key_value_heads: 16,
                max_position_embeddings: 2048,
                tie_word_embeddings: true,
                ..LlamaConfig::default()
            })
        };
        let gpt2 = Architecture::Gpt2(Gpt2Config {
            vocab_size: 50257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            ..Gpt2Config::default()
        });
        for (architecture, sequences, sequence_length, taken_gb) in [
            (llama(768, 2048, 12), 16, 1024, 10.64),
            (gpt2, 16, 1024, 9.25),
            (llama(1024, 2816, 24), 8, 1024, 17.26),
            (llama(2048, 5504, 24), 8, 2048, 62.2),
        ] {
            let training = TrainingSpec {
                batch_size: sequences,
                micro_batch_size: sequences,
                sequence_length,
                precision: Precision::Bf16,
                ..TrainingSpec::default()
            };
            let needed_gb = memory_bytes_needed(&architecture, &training, Device::Cuda(0)) as f64 / 1e9;
            assert!((0.85..1.05).contains(&(taken_gb / needed_gb)), "{taken_gb} GB of {needed_gb}");
        }
    }
}
