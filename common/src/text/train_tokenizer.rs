//! A byte-level BPE tokenizer made from a sample of text, in the form of GPT-2's: any text can be encoded, the
//! first token is the end of text, then the 256 bytes, then one token for each merge (Sennrich et al., arXiv
//! 1508.07909, section 3.2, over bytes as in Radford et al., 2019).
//!
//! The sample is the documents (of long `.txt` files: their stretches) with the least BLAKE3 digests, up to the first
//! that its bound does not hold: the same whatever the order of the files and the number of threads, and without
//! repetitions. So is the tokenizer. Memory is the sample, the sample's distinct words and a batch of pieces.

use std::{collections::BTreeMap, path::PathBuf};

use rayon::prelude::*;
use tokenizers::{
    AddedToken, Tokenizer,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainerBuilder},
    },
    pre_tokenizers::byte_level::ByteLevel,
};

use super::{
    documents::{Cancelled, Piece, Reader},
    error::TextError,
    parse::{Parsed, parse, parts},
    source::list,
};
use crate::tokenizer::{BYTE_END_OF_TEXT, byte_characters};

/// Pieces parsed at a time.
const BATCH_PIECES_MAX: usize = 4096;
/// Their bytes, less the last piece.
const BATCH_BYTES: usize = 16 << 20;
/// Longest text given to the library at once; as where text is encoded.
const PART_BYTES_MAX: usize = 1 << 20;
/// The end of text and the bytes.
const VOCABULARY_MIN: usize = 257;

/// What to make a tokenizer of.
#[derive(Debug, Clone)]
pub struct TokenizerRequest {
    /// Files and folders with text.
    pub sources: Vec<PathBuf>,
    /// The field of `.jsonl` lines, or the column of `.parquet` files, that is the text.
    pub text_key: String,
    /// Tokens that the tokenizer shall have, the end of text included.
    pub vocabulary: usize,
    /// Most bytes of text to learn from.
    pub sample_bytes_max: u64,
}

/// A tokenizer that was made.
#[derive(Debug)]
pub struct TrainedTokenizer {
    /// Its `tokenizer.json`.
    pub json: String,
    /// Its tokens: fewer than asked for if the sample has too few different words.
    pub vocabulary: usize,
    /// Distinct documents in the sample, and stretches of long ones.
    pub documents: u64,
    /// Their bytes.
    pub sample_bytes: u64,
    /// Files, pieces of files, lines and rows that were skipped.
    pub skipped: u64,
}

/// Makes a tokenizer. `progress` hears how many bytes of how many have been read, `learning` that the rest is
/// the library's, which says nothing on its way.
///
/// # Errors
/// A source is missing or holds no text, or the vocabulary cannot hold the bytes.
pub fn train_tokenizer(
    request: &TokenizerRequest,
    progress: &dyn Fn(u64, u64),
    learning: &dyn Fn(),
) -> Result<TrainedTokenizer, TextError> {
    let failed = |reason: String| TextError::TokenizerTraining { reason };
    if request.vocabulary < VOCABULARY_MIN {
        return Err(failed(format!(
            "a vocabulary of {} has no room for the 256 bytes and the end of text",
            request.vocabulary
        )));
    }
    let (sample, skipped) = sample(request, progress)?;
    learning();
    let end_of_text = AddedToken::from(BYTE_END_OF_TEXT, true);
    let mut trainer = TrainerWrapper::from(
        BpeTrainerBuilder::new()
            .vocab_size(request.vocabulary)
            .show_progress(false)
            .special_tokens(vec![end_of_text])
            .initial_alphabet(byte_characters().into_iter().collect())
            .build(),
    );
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let parts = sample.texts.values().flat_map(|text| parts(text, PART_BYTES_MAX));
    tokenizer.train(&mut trainer, parts).map_err(|error| failed(error.to_string()))?;
    Ok(TrainedTokenizer {
        json: tokenizer.to_string(true).map_err(|error| failed(error.to_string()))?,
        vocabulary: tokenizer.get_vocab_size(true),
        documents: sample.texts.len() as u64,
        sample_bytes: sample.bytes,
        skipped,
    })
}

/// The texts with the least digests.
#[derive(Default)]
struct Sample {
    texts: BTreeMap<u64, String>,
    bytes: u64,
    /// The least digest that was let go: none from it on belongs to the sample, however short its text.
    end: Option<u64>,
}

impl Sample {
    /// Takes a text in and lets those go that are beyond the bound; the first one stays in any case.
    fn add(&mut self, digest: u64, text: &str, bytes_max: u64) {
        let is_beyond = self.end.is_some_and(|end| digest >= end);
        if is_beyond || text.trim().is_empty() || self.texts.contains_key(&digest) {
            return;
        }
        self.texts.insert(digest, text.to_owned());
        self.bytes += text.len() as u64;
        while self.bytes > bytes_max && self.texts.len() > 1 {
            let Some((digest, text)) = self.texts.pop_last() else { break };
            self.bytes -= text.len() as u64;
            self.end = Some(digest);
        }
    }
}

/// Reads everything; also how many files, lines and rows were skipped.
fn sample(request: &TokenizerRequest, progress: &dyn Fn(u64, u64)) -> Result<(Sample, u64), TextError> {
    let mut files = Vec::new();
    let mut skipped = 0;
    for (index, source) in request.sources.iter().enumerate() {
        let listing = list(source, index, &request.text_key)?;
        skipped += listing.faults.len() as u64;
        files.extend(listing.files);
    }
    let bytes_total = files.iter().map(|file| file.bytes).sum();
    // Whoever stops this ends the process: nothing is written before it is done.
    let mut reader = Reader::new(&files, &|| false);
    let mut sample = Sample::default();
    let mut first_fault = None;
    loop {
        let batch = read_batch(&mut reader)?;
        if batch.is_empty() {
            break;
        }
        let parse = |piece: Piece| parse(piece.content, &request.text_key);
        for result in batch.into_par_iter().map(parse).collect::<Vec<_>>() {
            match result {
                Ok(Parsed { text, stretches, .. }) => {
                    for stretch in stretches {
                        sample.add(stretch.digest, &text[stretch.range], request.sample_bytes_max);
                    }
                }
                Err(reason) => {
                    skipped += 1;
                    first_fault.get_or_insert(reason);
                }
            }
        }
        progress(reader.bytes_read(), bytes_total);
    }
    if sample.texts.is_empty() {
        let first_fault = first_fault.unwrap_or_else(|| "all are empty or blank".to_owned());
        let paths = request.sources.iter().map(|source| source.display().to_string());
        let paths = paths.collect::<Vec<_>>().join(", ");
        return Err(TextError::NoDocuments { paths, files: files.len() as u64, first_fault });
    }
    Ok((sample, skipped))
}

fn read_batch(reader: &mut Reader<'_>) -> Result<Vec<Piece>, Cancelled> {
    let mut bytes = 0;
    let mut batch = Vec::new();
    while bytes < BATCH_BYTES && batch.len() < BATCH_PIECES_MAX {
        let Some(piece) = reader.next().transpose()? else { break };
        bytes += piece.bytes();
        batch.push(piece);
    }
    Ok(batch)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;
    use crate::text::TEXT_KEY;

    fn request(folder: &tempfile::TempDir, vocabulary: usize, sample_bytes_max: u64) -> TokenizerRequest {
        let sources = vec![folder.path().to_owned()];
        TokenizerRequest { sources, text_key: TEXT_KEY.to_owned(), vocabulary, sample_bytes_max }
    }

    fn train(request: &TokenizerRequest) -> Result<TrainedTokenizer, TextError> {
        train_tokenizer(request, &|_, _| {}, &|| {})
    }

    fn lines(range: std::ops::Range<u32>) -> String {
        let line = |n| {
            format!(
                "{{\"text\": \"the quick brown fox {n} jumps over the lazy dogs of number {}\"}}\n",
                n * 7919
            )
        };
        range.map(line).collect()
    }

    #[test]
    fn a_trained_tokenizer_encodes_and_decodes_any_text() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.jsonl"), lines(0..500)).unwrap();
        let trained = train(&request(&folder, 400, 1 << 20)).unwrap();
        assert_eq!((trained.vocabulary, trained.documents, trained.skipped), (400, 500, 0));
        let mut tokenizer = Tokenizer::from_bytes(trained.json).unwrap();
        assert_eq!((tokenizer.token_to_id(BYTE_END_OF_TEXT), tokenizer.get_vocab_size(true)), (Some(0), 400));
        // As text is encoded that is trained on: nothing in it is a token of its own.
        tokenizer.set_encode_special_tokens(true);
        for text in ["the quick brown fox", "<|endoftext|> 東京\n\t ü", ""] {
            let encoding = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(encoding.get_ids(), false).unwrap(), text);
        }
        assert!(tokenizer.encode("the quick brown fox", false).unwrap().len() < 6);
    }

    #[test]
    fn the_same_documents_give_the_same_file_whatever_their_order_and_the_threads() {
        let one = tempfile::tempdir().unwrap();
        fs::write(one.path().join("a.jsonl"), lines(0..600)).unwrap();
        let other = tempfile::tempdir().unwrap();
        fs::write(other.path().join("a.jsonl"), lines(300..600) + &lines(100..300)).unwrap();
        fs::write(other.path().join("b.jsonl"), "not json\n".to_owned() + &lines(0..400)).unwrap();
        // Less than there is: a sample has to be drawn.
        let expected = train(&request(&one, 350, 20_000)).unwrap();
        assert!(expected.sample_bytes <= 20_000 && expected.documents > 200, "{expected:?}");
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let trained = pool.install(|| train(&request(&other, 350, 20_000))).unwrap();
            assert_eq!(trained.skipped, 1);
            assert!(trained.json == expected.json, "{threads} threads");
        }
    }

    proptest! {
        /// Lengths differ by up to a hundred times.
        #[test]
        fn the_sample_is_the_least_digests_that_fit_whatever_the_order(
            documents in prop::collection::btree_map(any::<u64>(), prop_oneof![1usize..10, 100usize..1000], 1..40)
                .prop_flat_map(|map| Just(map.into_iter().collect::<Vec<_>>()).prop_shuffle()),
            bytes_max in 1u64..3_000,
        ) {
            let mut sample = Sample::default();
            for (digest, length) in documents.iter().chain(&documents) {
                sample.add(*digest, &"x".repeat(*length), bytes_max);
            }
            let mut sorted = documents;
            sorted.sort_unstable();
            let mut bytes = 0;
            let fits = |(index, (_, length)): &(usize, &(u64, usize))| {
                bytes += *length as u64;
                *index == 0 || bytes <= bytes_max
            };
            let expected = sorted.iter().enumerate().take_while(fits).map(|(_, document)| *document);
            let expected: Vec<(u64, usize)> = expected.collect();
            let found: Vec<_> = sample.texts.iter().map(|(digest, text)| (*digest, text.len())).collect();
            prop_assert_eq!(sample.bytes, found.iter().map(|(_, length)| *length as u64).sum::<u64>());
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn too_little_text_gives_a_smaller_vocabulary_and_none_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.txt"), "abcabc").unwrap();
        assert!((258..300).contains(&train(&request(&folder, 1_000, 100)).unwrap().vocabulary));
        let error = train(&request(&folder, 256, 100)).unwrap_err();
        assert!(error.to_string().contains("no room for the 256 bytes"), "{error}");
        fs::write(folder.path().join("a.txt"), " ").unwrap();
        let error = train(&request(&folder, 1_000, 100)).unwrap_err();
        assert!(matches!(error, TextError::NoDocuments { .. }), "{error}");
    }
}
