//! Text in files: which files hold it, the documents in them, and tokenizers made from it. The sites read what they
//! train on by this, and whoever makes a tokenizer what it is made from, by the same rules.
//!
//! Knows nothing of training. Errors and reports name files, lines and columns, never content.

mod documents;
mod error;
mod parse;
mod rows;
mod source;
mod train_tokenizer;

pub use self::{
    documents::{Cancelled, Content, PIECE_BYTES_MAX, Piece, Reader},
    error::TextError,
    parse::{Parsed, STRETCH_BYTES_MAX, Stretch, parse, parts},
    source::{Listing, Skipped, SourceFile, Survey, TEXT_KEY, list, survey},
    train_tokenizer::{TokenizerRequest, TrainedTokenizer, train_tokenizer},
};
