//! Seeded initial weights, bit-identical on every machine: an integer generator (ChaCha8), one stream
//! per tensor, and the Box-Muller transform over `libm`'s portable logarithm and trigonometry (the
//! platform's own differ in the last bit from system to system).

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::{Init, Manifest};

/// Values that one task fills at a time.
const PIECE: usize = 1 << 16;

pub(super) fn flat_vector(manifest: &Manifest, seed: u64) -> Vec<f32> {
    let mut flat =
        vec![0.0; usize::try_from(manifest.parameters()).expect("a vector fits the address space")];
    let pieces = flat.par_chunks_mut(PIECE).enumerate();
    pieces.for_each(|(index, piece)| fill(manifest, seed, (index * PIECE) as u64, piece));
    flat
}

/// Fills `values` with what the flat vector holds from `start` on. Every normal has its own place in its
/// tensor's stream, so that any piece can be made without the ones before it.
pub(super) fn fill(manifest: &Manifest, seed: u64, start: u64, values: &mut [f32]) {
    let end = start + values.len() as u64;
    let mut tensor_start = 0;
    for (stream, tensor) in manifest.tensors.iter().enumerate() {
        let tensor_end = tensor_start + tensor.parameters() as u64;
        let (from, to) = (tensor_start.max(start), tensor_end.min(end));
        if from < to {
            #[allow(clippy::cast_possible_truncation)] // both are inside `values`
            let piece = &mut values[(from - start) as usize..(to - start) as usize];
            match tensor.init {
                Init::Zeros => piece.fill(0.0),
                Init::Ones => piece.fill(1.0),
                Init::Normal(deviation) => {
                    fill_normal(piece, deviation, seed, stream as u64, from - tensor_start);
                }
            }
        }
        tensor_start = tensor_end;
    }
}

/// Fills `values`, which are not empty, with the tensor's normals from its `first` on: Box and Muller, "A Note on the Generation
/// of Random Normal Deviates" (1958), in which two uniforms give two normals.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
fn fill_normal(values: &mut [f32], deviation: f64, seed: u64, stream: u64, first: u64) {
    /// 32-bit words of the generator that a pair of normals takes.
    const PAIR_WORDS: u128 = 4;
    /// 53 random bits are a number below 1.
    const SCALE: f64 = 1.0 / (1u64 << 53) as f64;
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(stream);
    generator.set_word_pos(u128::from(first / 2) * PAIR_WORDS);
    let mut bits = move || (generator.next_u64() >> 11) as f64;
    let mut pair = move || {
        // The first uniform is in (0, 1] so that its logarithm is finite.
        let radius = deviation * libm::sqrt(-2.0 * libm::log((bits() + 1.0) * SCALE));
        let angle = std::f64::consts::TAU * (bits() * SCALE);
        [(radius * libm::cos(angle)) as f32, (radius * libm::sin(angle)) as f32]
    };
    let (second, pairs) = values.split_at_mut((first % 2) as usize);
    for value in second {
        *value = pair()[1];
    }
    for values in pairs.chunks_mut(2) {
        values.copy_from_slice(&pair()[..values.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Architecture, Gpt2Config, LlamaConfig};
    use crate::ids::Digest;

    fn digest(architecture: &Architecture, seed: u64) -> String {
        let flat = architecture.manifest().initialise(seed);
        Digest::of(bytemuck::cast_slice(&flat)).short()
    }

    /// The digest when `threads` threads do the work.
    fn digest_with(threads: usize, architecture: &Architecture) -> String {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| digest(architecture, 1))
    }

    #[test]
    fn initial_weights_are_the_same_bits_everywhere() {
        let llama = Architecture::Llama(LlamaConfig::default());
        let gpt2 = Architecture::Gpt2(Gpt2Config::default());
        assert_eq!(
            [digest(&llama, 1), digest(&llama, 2), digest(&gpt2, 1)],
            ["c92f54190d7f", "1655e0116ab0", "5d5e318eebdb"]
        );
    }

    #[test]
    fn any_piece_is_filled_as_in_the_whole() {
        let manifest =
            Architecture::Gpt2(Gpt2Config { n_embd: 16, n_layer: 1, ..Gpt2Config::default() }).manifest();
        let whole = manifest.initialise(1);
        for length in [1, 3, 250, 4096] {
            for start in (0..whole.len()).step_by(997) {
                let end = (start + length).min(whole.len());
                let mut piece = vec![f32::NAN; end - start];
                manifest.fill_initial(1, start as u64, &mut piece);
                assert_eq!(piece, whole[start..end], "{length} values from {start}");
            }
        }
    }

    #[test]
    fn initial_weights_do_not_depend_on_the_number_of_threads() {
        for architecture in
            [Architecture::Llama(LlamaConfig::default()), Architecture::Gpt2(Gpt2Config::default())]
        {
            let alone = digest_with(1, &architecture);
            assert_eq!(
                [digest_with(2, &architecture), digest_with(13, &architecture)],
                [alone.clone(), alone]
            );
        }
    }

    #[test]
    fn initial_weights_have_the_stated_distribution() {
        let architecture = Architecture::Llama(LlamaConfig::default());
        let flat = architecture.manifest().initialise(3);
        let embedding = &flat[..257 * 128];
        let mean = embedding.iter().map(|v| f64::from(*v)).sum::<f64>() / embedding.len() as f64;
        let variance = embedding.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / embedding.len() as f64;
        assert!(mean.abs() < 5e-4, "mean {mean}");
        assert!((variance.sqrt() - 0.02).abs() < 4e-4, "deviation {}", variance.sqrt());
    }
}
