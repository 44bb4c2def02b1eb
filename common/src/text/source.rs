//! Which files of a source hold text: `.txt` and `.jsonl`, each as it is or compressed (`.gz`, `.zst`), and
//! `.parquet`.
//!
//! Looks at names, sizes and times only; opens nothing.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::UNIX_EPOCH,
};

use serde::{Deserialize, Serialize};
use walkdir::WalkDir;

use super::error::TextError;

/// The field of a `.jsonl` file's lines, or the column of a `.parquet` file, that is the text, unless it is said.
pub const TEXT_KEY: &str = "text";
/// Most files of one source; a listing of this length takes some 200 MB of memory.
const FILES_MAX: usize = 1 << 20;

/// What a file is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Text,
    JsonLines,
    Parquet,
}

/// How it is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// A file with text.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// Index of the source.
    pub source: usize,
    /// Relative to the source.
    pub relative: PathBuf,
    /// Where it is.
    pub path: PathBuf,
    /// Bytes on disk.
    pub bytes: u64,
    /// Nanoseconds since 1970, 0 where the file system does not say.
    pub modified_ns: u128,
    /// The field or column that is the text, where there are such.
    pub text_key: Arc<str>,
    pub(super) format: Format,
    pub(super) compression: Compression,
}

/// The files of a source, sorted by relative path.
#[derive(Debug)]
pub struct Listing {
    /// Files with text.
    pub files: Vec<SourceFile>,
    /// Folders and files that could not be looked at.
    pub faults: Vec<Skipped>,
}

/// Something that was skipped, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Path relative to the source.
    pub file: String,
    /// Line in the file (row, of a .parquet file), from 1; absent where a file or a piece of it was skipped.
    pub line: Option<u64>,
    /// What was wrong; never content.
    pub reason: String,
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rows = self.file.to_ascii_lowercase().ends_with(".parquet");
        match self.line {
            Some(row) if rows => write!(f, "{}, row {row}: {}", self.file, self.reason),
            Some(line) => write!(f, "{}, line {line}: {}", self.file, self.reason),
            None => write!(f, "{}: {}", self.file, self.reason),
        }
    }
}

/// What kind of text a file name promises.
fn kind(name: &str) -> Option<(Format, Compression)> {
    let name = name.to_ascii_lowercase();
    let (stem, compression) = match (name.strip_suffix(".gz"), name.strip_suffix(".zst")) {
        (Some(stem), _) => (stem, Compression::Gzip),
        (_, Some(stem)) => (stem, Compression::Zstd),
        _ => (name.as_str(), Compression::None),
    };
    match Path::new(stem).extension()?.to_str()? {
        "txt" => Some((Format::Text, compression)),
        "jsonl" => Some((Format::JsonLines, compression)),
        // Its pages are compressed one by one; around the whole nothing could be found in it.
        "parquet" if compression == Compression::None => Some((Format::Parquet, compression)),
        _ => None,
    }
}

/// Lists a directory (with all below it, through links, without names that begin with a dot) or one file, as
/// source number `index` whose text is in the field or column `text_key`.
///
/// # Errors
/// If `source` is missing, unreadable, or holds no file with text.
pub fn list(source: &Path, index: usize, text_key: &str) -> Result<Listing, TextError> {
    let text_key: Arc<str> = text_key.into();
    let unreadable = |error| TextError::Source { path: source.to_owned(), source: error };
    if source.metadata().map_err(unreadable)?.is_dir() {
        source.read_dir().map_err(unreadable)?;
    }
    let hidden = |entry: &walkdir::DirEntry| {
        entry.depth() > 0 && entry.file_name().as_encoded_bytes().starts_with(b".")
    };
    let mut listing = Listing { files: Vec::new(), faults: Vec::new() };
    let mut other_files = 0;
    for entry in WalkDir::new(source).follow_links(true).into_iter().filter_entry(|entry| !hidden(entry)) {
        match entry.and_then(|entry| Ok((entry.metadata()?, entry))) {
            Ok((metadata, entry)) if metadata.is_file() => {
                match source_file(source, index, &text_key, &entry, &metadata) {
                    Some(_) if listing.files.len() == FILES_MAX => {
                        return Err(TextError::TooManyFiles { path: source.to_owned(), limit: FILES_MAX });
                    }
                    Some(file) => listing.files.push(file),
                    None => other_files += 1,
                }
            }
            Ok(_) => {}
            Err(error) => listing.faults.push(walk_fault(source, &error)),
        }
    }
    if listing.files.is_empty() {
        return Err(TextError::NoFiles { path: source.to_owned(), other_files });
    }
    listing.files.sort_by(|a, b| {
        a.relative.as_os_str().as_encoded_bytes().cmp(b.relative.as_os_str().as_encoded_bytes())
    });
    listing.faults.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(listing)
}

/// What a source holds by the names and sizes of its files; nothing of them is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// Files with text.
    pub files: u64,
    /// Their bytes on disk.
    pub bytes: u64,
    /// Folders and files that could not be looked at.
    pub faults: Vec<Skipped>,
}

/// Looks at a source without reading it.
///
/// # Errors
/// If `source` is missing, unreadable, or holds no file with text.
pub fn survey(source: &Path) -> Result<Survey, TextError> {
    let Listing { files, faults } = list(source, 0, TEXT_KEY)?;
    Ok(Survey { files: files.len() as u64, bytes: files.iter().map(|file| file.bytes).sum(), faults })
}

fn source_file(
    source: &Path,
    index: usize,
    text_key: &Arc<str>,
    entry: &walkdir::DirEntry,
    metadata: &std::fs::Metadata,
) -> Option<SourceFile> {
    let (format, compression) = kind(&entry.file_name().to_string_lossy())?;
    // A source that is itself a file has an empty path relative to itself.
    let relative = match entry.path().strip_prefix(source) {
        Ok(relative) if !relative.as_os_str().is_empty() => relative.to_owned(),
        _ => PathBuf::from(entry.file_name()),
    };
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Some(SourceFile {
        source: index,
        relative,
        path: entry.path().to_owned(),
        bytes: metadata.len(),
        modified_ns: modified.map_or(0, |time| time.as_nanos()),
        text_key: text_key.clone(),
        format,
        compression,
    })
}

fn walk_fault(source: &Path, error: &walkdir::Error) -> Skipped {
    let path = error.path().unwrap_or(source);
    let reason = match (error.loop_ancestor(), error.io_error()) {
        (Some(_), _) => "a link to a folder that contains it".to_owned(),
        (None, Some(error)) => format!("cannot be read: {error}"),
        (None, None) => "cannot be read".to_owned(),
    };
    Skipped { file: path.strip_prefix(source).unwrap_or(path).display().to_string(), line: None, reason }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn folder_with(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "text").unwrap();
        }
        folder
    }

    fn names(listing: &Listing) -> Vec<&str> {
        listing.files.iter().map(|file| file.relative.to_str().unwrap()).collect()
    }

    #[test]
    fn files_are_known_by_their_names() {
        for (name, expected) in [
            ("a.txt", Some((Format::Text, Compression::None))),
            ("a.b.TXT.gz", Some((Format::Text, Compression::Gzip))),
            ("a.txt.zst", Some((Format::Text, Compression::Zstd))),
            ("a.jsonl", Some((Format::JsonLines, Compression::None))),
            ("a.jsonl.gz", Some((Format::JsonLines, Compression::Gzip))),
            ("a.jsonl.zst", Some((Format::JsonLines, Compression::Zstd))),
            ("a.parquet", Some((Format::Parquet, Compression::None))),
            ("a.parquet.gz", None),
            ("a.json", None),
            ("a.txt.bz2", None),
            ("txt", None),
            ("a.gz", None),
        ] {
            assert_eq!(kind(name), expected, "{name}");
        }
    }

    #[test]
    fn a_folder_is_listed_with_all_below_it_in_order() {
        let folder = folder_with(&[
            "b.txt",
            "a/z.jsonl",
            "a/b/c.txt.gz",
            "a.txt",
            ".hidden.txt",
            ".git/x.txt",
            "c.pdf",
        ]);
        let listing = list(folder.path(), 0, TEXT_KEY).unwrap();
        assert_eq!(names(&listing), ["a.txt", "a/b/c.txt.gz", "a/z.jsonl", "b.txt"]);
        assert!(listing.files.iter().all(|file| file.bytes == 4 && file.modified_ns > 0));
    }

    #[test]
    fn one_file_is_a_source() {
        let folder = folder_with(&["a.txt", "b.txt"]);
        assert_eq!(names(&list(&folder.path().join("b.txt"), 0, TEXT_KEY).unwrap()), ["b.txt"]);
    }

    #[test]
    #[cfg(unix)]
    fn links_are_followed_but_not_in_circles() {
        let folder = folder_with(&["real/a.txt"]);
        let elsewhere = folder_with(&["b.txt"]);
        std::os::unix::fs::symlink(elsewhere.path(), folder.path().join("linked")).unwrap();
        std::os::unix::fs::symlink(folder.path(), folder.path().join("real/loop")).unwrap();
        std::os::unix::fs::symlink("nowhere", folder.path().join("broken.txt")).unwrap();
        let listing = list(folder.path(), 0, TEXT_KEY).unwrap();
        assert_eq!(names(&listing), ["linked/b.txt", "real/a.txt"]);
        let faults: Vec<&str> = listing.faults.iter().map(|fault| fault.file.as_str()).collect();
        assert_eq!(faults, ["broken.txt", "real/loop"]);
    }

    #[test]
    fn a_source_without_text_is_an_error() {
        let folder = folder_with(&["a.pdf", "b.json"]);
        let error = list(folder.path(), 0, TEXT_KEY).unwrap_err();
        assert!(matches!(error, TextError::NoFiles { other_files: 2, .. }), "{error}");
        assert!(error.to_string().contains(".jsonl"), "{error}");
        let error = list(&folder.path().join("missing"), 0, TEXT_KEY).unwrap_err();
        assert!(matches!(error, TextError::Source { .. }), "{error}");
        assert!(matches!(
            list(tempfile::tempdir().unwrap().path(), 0, TEXT_KEY),
            Err(TextError::NoFiles { other_files: 0, .. })
        ));
    }
}
