//! Small deterministic corpora.

use std::{fs, path::Path};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Writes a site's corpus: `documents` of word salad, each a JSON line; sites differ by `seed`.
pub fn write(directory: &Path, seed: u64, documents: usize) {
    const WORDS: [&str; 16] = [
        "model", "round", "delta", "site", "patient", "ledger", "the", "a", "of", "trains", "sends", "keeps",
        "averages", "bank", "hospital", "quietly",
    ];
    fs::create_dir_all(directory).expect("the corpus can be written");
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut lines = String::new();
    for document in 0..documents {
        let words: Vec<&str> = (0..60).map(|_| WORDS[generator.random_range(0..WORDS.len())]).collect();
        let text = format!("{document} {}", words.join(" "));
        lines += &serde_json::json!({ "text": text }).to_string();
        lines.push('\n');
    }
    fs::write(directory.join("corpus.jsonl"), lines).expect("the corpus can be written");
}
