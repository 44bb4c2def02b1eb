//! Files and directories that are whole or not there, whatever instant the power goes.
//!
//! Everything is written beside its final place under a name of its own ([`partial_path`]), fsynced and
//! renamed, and the parent directory is fsynced, so that the name too survives. A left-over partial is
//! overwritten by the next attempt: rubbish cannot pile up, and one path must have one writer at a time.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// What partial files' names end with; a reader of a directory skips them.
pub const PARTIAL_SUFFIX: &str = ".partial";
/// What the name of a directory that is being replaced ends with, for the instant that it takes.
const REPLACED_SUFFIX: &str = ".replaced";

/// Where the content of `path` is written before it is renamed: `.NAME.partial` in the same directory.
pub fn partial_path(path: &Path) -> PathBuf {
    sibling(path, PARTIAL_SUFFIX)
}

/// Writes `bytes` to `path`, replacing what was there in one step; durable on return.
///
/// # Errors
/// Any error of the file system, naming the path; `path` is then as before.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_atomically_with(path, |file| file.write_all(bytes))
}

/// Like [`write_atomically`] for content that `fill` writes piece by piece.
///
/// # Errors
/// Any error of `fill` or of the file system, naming the path; `path` is then as before.
pub fn write_atomically_with(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let partial = partial_path(path);
    let result = write_durably(&partial, fill)
        .and_then(|()| named("rename into place", path, fs::rename(&partial, path)))
        .and_then(|()| sync_directory(parent(path)));
    if result.is_err() {
        // Space is what is missing most often: give it back. The first error is the one to report.
        let _ = fs::remove_file(&partial);
    }
    result
}

/// Creates or truncates `path`, lets `fill` write it, and fsyncs it. Not atomic by itself: for the files
/// of a directory that [`rename_directory_into_place`] then publishes.
///
/// # Errors
/// Any error of `fill` or of the file system, naming the path.
pub fn write_durably(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let mut file =
        named("create", path, OpenOptions::new().write(true).create(true).truncate(true).open(path))?;
    named("write", path, fill(&mut file))?;
    named("sync", path, file.sync_all())
}

/// An empty directory in which the content of `path` can be prepared: [`partial_path`], emptied of what
/// an earlier attempt left. The parents of `path` are created.
///
/// # Errors
/// Any error of the file system, naming the path.
pub fn create_partial_directory(path: &Path) -> io::Result<PathBuf> {
    let partial = partial_path(path);
    remove_directory(&partial)?;
    named("create", &partial, fs::create_dir_all(&partial))?;
    Ok(partial)
}

/// Renames the finished directory `from`, whose files are fsynced, to `to` in the same parent; durable on
/// return. A directory that was at `to` is replaced: at every instant there is the old one, none, or
/// the new one, and never a mixture.
///
/// # Errors
/// Any error of the file system, naming the path.
pub fn rename_directory_into_place(from: &Path, to: &Path) -> io::Result<()> {
    sync_directory(from)?;
    let replaced = sibling(to, REPLACED_SUFFIX);
    if to.exists() {
        remove_directory(&replaced)?;
        named("move aside", to, fs::rename(to, &replaced))?;
    }
    named("rename into place", to, fs::rename(from, to))?;
    sync_directory(parent(to))?;
    remove_directory(&replaced)
}

/// Makes the names in a directory durable.
///
/// # Errors
/// Any error of the file system, naming the path.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    named("sync", path, File::open(path).and_then(|directory| directory.sync_all()))
}

/// Removes a directory with its content; one that is not there is no error.
///
/// # Errors
/// Any other error of the file system, naming the path.
pub fn remove_directory(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => named("remove", path, result),
    }
}

/// The directory that holds `path`; "." for a bare name.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(suffix);
    parent(path).join(name)
}

/// Adds the path and what was attempted to an error, keeping its kind.
pub(crate) fn named<T>(attempt: &str, path: &Path, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot {attempt} {}: {error}", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        write_atomically(&path, b"a long first content").unwrap();
        write_atomically(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(directory.path()), ["state.json"]);
    }

    #[test]
    fn a_failed_write_leaves_the_old_content_and_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        write_atomically(&path, b"old").unwrap();
        let error = write_atomically_with(&path, |file| {
            file.write_all(b"half of the n")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        })
        .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(error.to_string().contains("state.json"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(directory.path()), ["state.json"]);
    }

    #[test]
    fn a_directory_takes_the_place_of_another() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("parents/round-1");
        for content in ["one", "two"] {
            let partial = create_partial_directory(&path).unwrap();
            write_durably(&partial.join(content), |file| file.write_all(content.as_bytes())).unwrap();
            rename_directory_into_place(&partial, &path).unwrap();
            assert_eq!(names(&path), [content]);
        }
        assert_eq!(names(path.parent().unwrap()), ["round-1"]);
    }

    #[test]
    fn what_an_earlier_attempt_left_does_not_get_into_the_next() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("round-1");
        fs::write(create_partial_directory(&path).unwrap().join("stale"), "x").unwrap();
        assert_eq!(names(&create_partial_directory(&path).unwrap()), [""; 0]);
    }

    #[test]
    fn a_bare_name_lies_in_the_working_directory() {
        assert_eq!(partial_path(Path::new("a.txt")), Path::new("./.a.txt.partial"));
    }
}
