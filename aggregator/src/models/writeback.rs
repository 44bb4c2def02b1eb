//! Getting a version onto the disk while it is still being written, so that little is left to wait for in the
//! end: the system by itself begins only after seconds, or when memory is short.

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, SyncSender},
    },
    thread::{self, JoinHandle},
};

use super::files::Parts;

/// Bytes that are written before they are taken to the disk together.
const BYTES_PER_SYNC: u64 = 32 << 20;

/// A thread that syncs a version's files from time to time. Dropped, it ends after what it is doing.
#[derive(Debug)]
pub(super) struct Writeback {
    written_bytes: AtomicU64,
    wake: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Writeback {
    pub(super) fn start(parts: Arc<Parts<File>>) -> io::Result<Self> {
        let (wake, woken) = mpsc::sync_channel(1);
        let sync = move || woken.iter().try_for_each(|()| parts.iter().try_for_each(File::sync_data));
        let thread = thread::Builder::new().name("writeback".to_owned()).spawn(sync)?;
        Ok(Self { written_bytes: AtomicU64::new(0), wake, thread })
    }

    /// Tells that so many bytes more are written. Never waits.
    pub(super) fn written(&self, bytes: u64) {
        let before = self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before / BYTES_PER_SYNC != (before + bytes) / BYTES_PER_SYNC {
            // It is awake already, or has failed, which the end tells.
            let _ = self.wake.try_send(());
        }
    }

    /// Waits until the thread has ended.
    ///
    /// # Errors
    /// The first failure: the system tells of one that lost data only once, so it must not be forgotten.
    pub(super) fn finish(self) -> io::Result<()> {
        let Self { wake, thread, .. } = self;
        drop(wake);
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that syncs failed")))
    }
}
