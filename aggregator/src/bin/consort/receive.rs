//! Files that arrive in parts, written into one folder. A sender cannot make this write anywhere else, nor
//! have a file count as whole that is not.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use consort_common::atomic_file::sync_directory;
use consort_proto::v1::FilePart;

/// Files that are taken at most.
const FILES_MAX: usize = 10_000;
/// Longest part of a name, in bytes, as file systems have it; and parts of a name.
const NAME_PART_BYTES_MAX: usize = 255;
const NAME_PARTS_MAX: usize = 8;

/// Why a file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The name leads out of the folder, or is not one for a file.
    #[error("the file name {0:?} is not a plain relative path; nothing was written for it")]
    Name(String),
    /// Too many files.
    #[error("there are more than {FILES_MAX} files")]
    Files,
    /// A part that does not follow the one before.
    #[error(
        "{name}: a part for byte {offset} of {file_bytes} arrived where byte {expected} of {expected_bytes} comes next"
    )]
    Order {
        /// The file.
        name: String,
        /// The part's position.
        offset: u64,
        /// The file's length as the part has it.
        file_bytes: u64,
        /// The position that was expected.
        expected: u64,
        /// The file's length as its first part had it.
        expected_bytes: u64,
    },
    /// The stream ended, or went on to another file, too early.
    #[error("{name} is not whole: {written} of {file_bytes} bytes arrived; try again")]
    Incomplete {
        /// The file.
        name: String,
        /// Bytes that arrived.
        written: u64,
        /// Bytes that the file has.
        file_bytes: u64,
    },
    /// Nothing arrived.
    #[error("no file arrived")]
    Empty,
    /// The file system refused.
    #[error("cannot write {path}: {source}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Takes the parts of one stream.
#[derive(Debug)]
pub struct Receiver {
    folder: PathBuf,
    current: Option<Incoming>,
    files: usize,
}

#[derive(Debug)]
struct Incoming {
    name: String,
    path: PathBuf,
    file: File,
    file_bytes: u64,
    written: u64,
}

impl Receiver {
    /// Into `folder`, which exists and is empty.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), current: None, files: 0 }
    }

    /// Takes the next part.
    pub fn take(&mut self, part: &FilePart) -> Result<(), ReceiveError> {
        if self.current.as_ref().is_none_or(|current| current.name != part.name) {
            self.finish_file()?;
            self.current = Some(self.begin_file(part)?);
        }
        match &mut self.current {
            Some(current) => current.append(part),
            None => Ok(()),
        }
    }

    /// The stream ended: the number of files, all of them whole and durable.
    pub fn finish(mut self) -> Result<usize, ReceiveError> {
        self.finish_file()?;
        if self.files == 0 { Err(ReceiveError::Empty) } else { Ok(self.files) }
    }

    fn begin_file(&mut self, part: &FilePart) -> Result<Incoming, ReceiveError> {
        let path = self.folder.join(safe_path(&part.name)?);
        if self.files == FILES_MAX {
            return Err(ReceiveError::Files);
        }
        self.files += 1;
        let parent = path.parent().unwrap_or(&self.folder);
        // A name that comes twice is refused by `create_new`: the first file was finished.
        let file = std::fs::create_dir_all(parent)
            .and_then(|()| OpenOptions::new().write(true).create_new(true).open(&path))
            .map_err(|source| ReceiveError::Write { path: path.clone(), source })?;
        Ok(Incoming { name: part.name.clone(), path, file, file_bytes: part.file_bytes, written: 0 })
    }

    fn finish_file(&mut self) -> Result<(), ReceiveError> {
        let Some(Incoming { name, path, file, file_bytes, written }) = self.current.take() else {
            return Ok(());
        };
        if written != file_bytes {
            return Err(ReceiveError::Incomplete { name, written, file_bytes });
        }
        let parent = path.parent().unwrap_or(&self.folder).to_owned();
        file.sync_all()
            .and_then(|()| sync_directory(&parent))
            .map_err(|source| ReceiveError::Write { path, source })
    }
}

impl Incoming {
    fn append(&mut self, part: &FilePart) -> Result<(), ReceiveError> {
        let end = part.offset.saturating_add(part.data.len() as u64);
        if part.offset != self.written || part.file_bytes != self.file_bytes || end > self.file_bytes {
            return Err(ReceiveError::Order {
                name: self.name.clone(),
                offset: part.offset,
                file_bytes: part.file_bytes,
                expected: self.written,
                expected_bytes: self.file_bytes,
            });
        }
        self.file
            .write_all(&part.data)
            .map_err(|source| ReceiveError::Write { path: self.path.clone(), source })?;
        self.written = end;
        Ok(())
    }
}

/// The path that a name means inside the folder: plain parts between '/', none that any system gives a
/// meaning of its own.
fn safe_path(name: &str) -> Result<PathBuf, ReceiveError> {
    let plain = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part.len() <= NAME_PART_BYTES_MAX
            && !part.chars().any(|character| character.is_control() || matches!(character, '\\' | ':'))
    };
    let parts: Vec<&str> = name.split('/').take(NAME_PARTS_MAX + 1).collect();
    if parts.len() <= NAME_PARTS_MAX && parts.iter().all(|part| plain(part)) {
        Ok(parts.iter().collect())
    } else {
        Err(ReceiveError::Name(name.chars().take(160).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(name: &str, file_bytes: u64, offset: u64, data: &'static [u8]) -> FilePart {
        FilePart { name: name.into(), file_bytes, offset, data: data.into() }
    }

    fn receive(parts: &[FilePart]) -> (tempfile::TempDir, Result<usize, ReceiveError>) {
        let folder = tempfile::tempdir().unwrap();
        let mut receiver = Receiver::new(folder.path());
        let result = parts.iter().try_for_each(|part| receiver.take(part)).and_then(|()| receiver.finish());
        (folder, result)
    }

    fn check_refused(parts: &[FilePart], expected: &str) {
        let (_folder, result) = receive(parts);
        let text = result.unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn files_are_put_together_from_their_parts() {
        let (folder, result) = receive(&[
            part("config.json", 2, 0, b"{}"),
            part("empty", 0, 0, b""),
            part("sub/model.safetensors", 5, 0, b"abc"),
            part("sub/model.safetensors", 5, 3, b"de"),
        ]);
        assert_eq!(result.unwrap(), 3);
        let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
        assert_eq!(read("config.json"), b"{}");
        assert_eq!(read("empty"), b"");
        assert_eq!(read("sub/model.safetensors"), b"abcde");
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        for name in [
            "",
            ".",
            "..",
            "../x",
            "a/../../x",
            "/etc/passwd",
            "a//b",
            "a/",
            "a\\..\\x",
            "C:x",
            "a\0b",
            "a/./b",
            "x\n",
        ] {
            check_refused(&[part(name, 1, 0, b"x")], "not a plain relative path");
        }
        check_refused(&[part(&"a/".repeat(9), 1, 0, b"x")], "not a plain relative path");
        check_refused(&[part(&"a".repeat(256), 1, 0, b"x")], "not a plain relative path");
        assert_eq!(safe_path("..a/b.c").unwrap(), Path::new("..a/b.c"));
    }

    #[test]
    fn a_file_that_is_not_whole_is_not_taken() {
        check_refused(&[part("a", 3, 0, b"ab")], "a is not whole: 2 of 3 bytes");
        check_refused(&[part("a", 3, 0, b"ab"), part("b", 1, 0, b"b")], "a is not whole");
        check_refused(&[], "no file");
    }

    #[test]
    fn parts_out_of_order_too_long_or_twice_are_refused() {
        check_refused(&[part("a", 3, 1, b"b")], "a part for byte 1 of 3 arrived where byte 0 of 3");
        check_refused(&[part("a", 3, 0, b"ab"), part("a", 3, 1, b"bc")], "where byte 2 of 3");
        check_refused(&[part("a", 1, 0, b"ab")], "a part for byte 0");
        check_refused(
            &[part("a", 2, 0, b"a"), part("a", 3, 1, b"bc")],
            "byte 1 of 3 arrived where byte 1 of 2",
        );
        check_refused(&[part("a", 1, 0, b"a"), part("b", 1, 0, b"b"), part("a", 1, 0, b"a")], "cannot write");
        check_refused(&[part("a", 9, u64::MAX, b"ab")], "byte 18446744073709551615");
    }
}
