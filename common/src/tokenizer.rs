//! The built-in byte-level tokenizer as a Hugging Face `tokenizer.json`: 256 byte tokens with the ids 0 to
//! 255 and `<|endoftext|>` = 256. Sites and checkpoints thus know one tokenizer format only.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// Text of the token that ends a document in the byte-level tokenizer.
pub const BYTE_END_OF_TEXT: &str = "<|endoftext|>";
/// Its id.
pub const BYTE_END_OF_TEXT_ID: u32 = 256;
/// Tokens of the byte-level tokenizer.
pub const BYTE_VOCABULARY: usize = 257;

/// GPT-2's printable character for each byte: itself where printable, else shifted past 255.
fn byte_character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let shift = (0..byte).filter(|other| !printable(*other)).count();
    char::from_u32(256 + u32::try_from(shift).unwrap_or_default()).unwrap_or('\u{FFFD}')
}

/// GPT-2's printable character for each byte, by which byte-level tokenizers write their tokens.
pub fn byte_characters() -> [char; 256] {
    std::array::from_fn(|byte| byte_character(u8::try_from(byte).unwrap_or_default()))
}

/// `tokenizer.json` of the byte-level tokenizer.
pub fn byte_tokenizer_json() -> String {
    let mut vocabulary: Map<String, Value> =
        (0..=255u8).map(|byte| (byte_character(byte).to_string(), json!(byte))).collect();
    vocabulary.insert(BYTE_END_OF_TEXT.to_owned(), json!(BYTE_END_OF_TEXT_ID));
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": BYTE_END_OF_TEXT_ID,
            "content": BYTE_END_OF_TEXT,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "vocab": vocabulary,
            "merges": [],
        },
    })
    .to_string()
}

/// The id of the token with this text in a `tokenizer.json`: an added token, or one of the model's
/// vocabulary (a map in BPE, WordPiece and WordLevel; a list of pairs in Unigram).
pub fn token_id(tokenizer_json: &Value, text: &str) -> Option<u32> {
    let added = tokenizer_json["added_tokens"].as_array().into_iter().flatten();
    let added = added.filter(|token| token["content"] == text).find_map(|token| token["id"].as_u64());
    let vocabulary = &tokenizer_json["model"]["vocab"];
    let listed = || vocabulary.as_array()?.iter().position(|pair| pair[0] == text).map(|id| id as u64);
    let id = added.or_else(|| vocabulary[text].as_u64()).or_else(listed)?;
    u32::try_from(id).ok()
}

/// Every token of a `tokenizer.json` with its id, by its text.
pub fn vocabulary(tokenizer_json: &Value) -> BTreeMap<String, u64> {
    let vocabulary = &tokenizer_json["model"]["vocab"];
    let mapped = vocabulary.as_object().into_iter().flatten();
    let mapped = mapped.filter_map(|(text, id)| Some((text.clone(), id.as_u64()?)));
    let listed = vocabulary.as_array().into_iter().flatten().zip(0..);
    let listed = listed.filter_map(|(pair, id)| Some((pair[0].as_str()?.to_owned(), id)));
    let added = tokenizer_json["added_tokens"].as_array().into_iter().flatten();
    let added =
        added.filter_map(|token| Some((token["content"].as_str()?.to_owned(), token["id"].as_u64()?)));
    mapped.chain(listed).chain(added).collect()
}

/// Rows that an embedding needs for a `tokenizer.json`: one more than the largest token id.
pub fn vocabulary_size(tokenizer_json: &Value) -> u64 {
    let added = tokenizer_json["added_tokens"].as_array().into_iter().flatten();
    let added = added.filter_map(|token| token["id"].as_u64());
    let vocabulary = &tokenizer_json["model"]["vocab"];
    let mapped = vocabulary.as_object().into_iter().flatten().filter_map(|(_, id)| id.as_u64());
    let listed = vocabulary.as_array().map_or(0, |pairs| pairs.len() as u64);
    added.chain(mapped).map(|id| id + 1).max().unwrap_or(0).max(listed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_found_by_their_text() {
        let byte = serde_json::from_str(&byte_tokenizer_json()).unwrap();
        assert_eq!(token_id(&byte, BYTE_END_OF_TEXT), Some(BYTE_END_OF_TEXT_ID));
        assert_eq!(token_id(&byte, "A"), Some(65));
        assert_eq!(token_id(&byte, "AA"), None);
        let unigram = json!({"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["</s>", -1.0]]}});
        assert_eq!(token_id(&unigram, "</s>"), Some(1));
        assert_eq!(token_id(&json!(null), "</s>"), None);
        assert_eq!(vocabulary(&unigram), [("</s>".to_owned(), 1), ("<unk>".to_owned(), 0)].into());
        assert_eq!((vocabulary(&byte).len(), vocabulary(&byte)["A"]), (257, 65));
        assert_eq!(
            (vocabulary_size(&byte), vocabulary_size(&unigram), vocabulary_size(&json!(null))),
            (257, 2, 0)
        );
    }

    #[test]
    fn each_byte_has_a_character_of_its_own() {
        let characters: std::collections::BTreeSet<char> = byte_characters().into_iter().collect();
        assert_eq!(characters.len(), 256);
        assert_eq!(byte_character(b' '), 'Ġ');
        assert_eq!(byte_character(b'\n'), 'Ċ');
    }
}
