//! Seeded initial weights, bit-identical on every machine: an integer generator (ChaCha8), one stream
//! per tensor, and the Box-Muller transform over `libm`'s portable logarithm and trigonometry (the
//! platform's own differ in the last bit from system to system).

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::{Init, Manifest};

pub(super) fn flat_vector(manifest: &Manifest, seed: u64) -> Vec<f32> {
    let mut flat =
        vec![0.0; usize::try_from(manifest.parameters()).expect("a vector fits the address space")];
    let mut rest = flat.as_mut_slice();
    let mut work = Vec::new();
    for (stream, tensor) in manifest.tensors.iter().enumerate() {
        let (values, tail) = rest.split_at_mut(tensor.parameters());
        work.push((stream as u64, tensor.init, values));
        rest = tail;
    }
    work.into_par_iter().for_each(|(stream, init, values)| match init {
        Init::Zeros => {}
        Init::Ones => values.fill(1.0),
        Init::Normal(deviation) => fill_normal(values, deviation, seed, stream),
    });
    flat
}

/// Box and Muller, "A Note on the Generation of Random Normal Deviates" (1958): two uniforms give two
/// normals.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
fn fill_normal(values: &mut [f32], deviation: f64, seed: u64, stream: u64) {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(stream);
    // 53 random bits; the first uniform is in (0, 1] so that its logarithm is finite.
    let mut bits = move || (generator.next_u64() >> 11) as f64;
    const SCALE: f64 = 1.0 / (1u64 << 53) as f64;
    for pair in values.chunks_mut(2) {
        let radius = deviation * libm::sqrt(-2.0 * libm::log((bits() + 1.0) * SCALE));
        let angle = std::f64::consts::TAU * (bits() * SCALE);
        pair[0] = (radius * libm::cos(angle)) as f32;
        if let Some(second) = pair.get_mut(1) {
            *second = (radius * libm::sin(angle)) as f32;
        }
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
