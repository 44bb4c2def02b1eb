//! Batches read ahead: a thread of its own fetches the next ones from the sampler while the current one is
//! trained on, so that training does not wait for the disk. The order of each epoch is made there too, the first
//! one included, and what of that is waited for is counted.
//!
//! What was fetched and not taken leaves no trace: the cursor is that after the last batch taken. Memory is
//! [`BATCHES_AHEAD`] batches waiting, one being filled and one being trained on; their buffers go round.

use std::{
    sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    error::DataError,
    sampler::{Cursor, Sampler},
};

/// Batches that wait to be taken, at most. One would do for an even pace; the second bridges a page of the
/// shard that has to come from a slow disk.
const BATCHES_AHEAD: usize = 2;

/// A batch as it is handed out.
#[derive(Debug)]
struct Batch {
    /// `[sequences, sequence_length + 1]`, row by row.
    tokens: Vec<i64>,
    /// Where the batch after this one begins.
    cursor: Cursor,
}

/// Hands out the batches of a sampler, in its order. Dropping it ends its thread.
#[derive(Debug)]
pub struct Feed {
    /// The batch that was taken last.
    taken: Option<Batch>,
    /// Where `taken` begins.
    before: Cursor,
    /// Whether `taken` is to be handed out again.
    put_back: bool,
    waited: Duration,
    /// Nothing once the feed has ended.
    reader: Option<Reader>,
}

#[derive(Debug)]
struct Reader {
    batches: Receiver<Result<Batch, DataError>>,
    /// Buffers to be filled again.
    used: Sender<Vec<i64>>,
    thread: JoinHandle<()>,
}

impl Feed {
    /// Begins to read batches of `sequences` at the sampler's cursor.
    ///
    /// # Errors
    /// [`DataError::Feed`] if there can be no thread.
    pub fn new(sampler: Sampler, sequences: usize) -> Result<Self, DataError> {
        let before = sampler.cursor();
        let (filled, batches) = sync_channel(BATCHES_AHEAD);
        let (used, buffers) = channel();
        let thread = thread::Builder::new()
            .name("feed".to_owned())
            .spawn(move || fill(sampler, sequences, &filled, &buffers))
            .map_err(|error| DataError::Feed { reason: format!("cannot be started: {error}") })?;
        let reader = Some(Reader { batches, used, thread });
        Ok(Self { taken: None, before, put_back: false, waited: Duration::ZERO, reader })
    }

    /// The next batch, `[sequences, sequence_length + 1]` row by row.
    ///
    /// # Errors
    /// What the sampler found wrong with the text, once; after it, and if the thread has died,
    /// [`DataError::Feed`].
    pub fn next_batch(&mut self) -> Result<&[i64], DataError> {
        if !std::mem::take(&mut self.put_back) {
            let batch = self.receive()?;
            if let Some(Batch { tokens, cursor }) = self.taken.replace(batch) {
                self.before = cursor;
                if let Some(reader) = &self.reader {
                    // The thread may have ended, and then fills no more buffers.
                    let _ = reader.used.send(tokens);
                }
            }
        }
        Ok(self.taken.as_ref().map_or(&[], |batch| &batch.tokens))
    }

    fn receive(&mut self) -> Result<Batch, DataError> {
        let ended = || DataError::Feed { reason: "has ended".to_owned() };
        let batches = &self.reader.as_ref().ok_or_else(ended)?.batches;
        let received = match batches.try_recv() {
            Ok(received) => received,
            Err(TryRecvError::Disconnected) => return Err(ended()),
            Err(TryRecvError::Empty) => {
                let since = Instant::now();
                let received = batches.recv();
                self.waited += since.elapsed();
                received.map_err(|_| ended())?
            }
        };
        received.inspect_err(|_| self.reader = None)
    }

    /// Takes the last batch back, as if it had not been handed out: [`Feed::next_batch`] gives it again.
    pub fn put_back(&mut self) {
        self.put_back = self.taken.is_some();
    }

    /// Where the next batch begins.
    pub fn cursor(&self) -> Cursor {
        match &self.taken {
            Some(batch) if !self.put_back => batch.cursor.clone(),
            _ => self.before.clone(),
        }
    }

    /// How long [`Feed::next_batch`] has waited for batches, in all.
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        if let Some(Reader { batches, thread, .. }) = self.reader.take() {
            // Whoever waits to hand over a batch is told that nobody takes it.
            drop(batches);
            // If it has panicked, it has said so.
            let _ = thread.join();
        }
    }
}

/// Fills buffers until nobody takes them or the text is damaged.
fn fill(
    mut sampler: Sampler,
    sequences: usize,
    filled: &SyncSender<Result<Batch, DataError>>,
    buffers: &Receiver<Vec<i64>>,
) {
    loop {
        let mut tokens = buffers.try_recv().unwrap_or_default();
        let batch =
            sampler.next_batch(sequences, &mut tokens).map(|()| Batch { tokens, cursor: sampler.cursor() });
        let is_last = batch.is_err();
        if filled.send(batch).is_err() || is_last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{
            sampler::tests::mixture_of,
            shard::tests::{owners, shard_of},
        },
        *,
    };

    fn sampler(vocabulary: usize) -> Sampler {
        let ids: Vec<u32> = (0..100).collect();
        Sampler::new(mixture_of(shard_of(&ids, vocabulary)), 7, 1, "a").unwrap()
    }

    fn expected(batches: usize, sequences: usize) -> Vec<(Vec<i64>, Cursor)> {
        let mut sampler = sampler(1_000);
        let mut batch = Vec::new();
        (0..batches)
            .map(|_| {
                sampler.next_batch(sequences, &mut batch).unwrap();
                (batch.clone(), sampler.cursor())
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_feed_gives_the_samplers_batches_and_goes_on_after_the_last_one_taken(
            sequences in 1usize..5, stop in 0usize..12, put_back: bool,
        ) {
            let expected = expected(12, sequences);
            let mut feed = Feed::new(sampler(1_000), sequences).unwrap();
            for (tokens, cursor) in &expected[..stop] {
                prop_assert_eq!(feed.next_batch().unwrap(), tokens.as_slice());
                prop_assert_eq!(&feed.cursor(), cursor);
            }
            let mut stop = stop;
            if put_back && stop > 0 {
                feed.put_back();
                stop -= 1;
            }
            let mut resumed = sampler(1_000);
            resumed.seek(&feed.cursor());
            let mut resumed = Feed::new(resumed, sequences).unwrap();
            for (tokens, cursor) in &expected[stop..] {
                for feed in [&mut feed, &mut resumed] {
                    prop_assert_eq!(feed.next_batch().unwrap(), tokens.as_slice());
                    prop_assert_eq!(&feed.cursor(), cursor);
                }
            }
        }
    }

    #[test]
    fn a_damaged_shard_is_reported_once_where_it_is_reached() {
        // Token 99 is beyond the vocabulary.
        let mut feed = Feed::new(sampler(99), 1).unwrap();
        let error = loop {
            let cursor = feed.cursor();
            if let Err(error) = feed.next_batch() {
                assert_eq!(feed.cursor(), cursor);
                break error;
            }
        };
        assert!(matches!(error, DataError::Corrupt { .. }), "{error}");
        let error = feed.next_batch().unwrap_err();
        assert!(matches!(error, DataError::Feed { .. }), "{error}");
    }

    #[test]
    fn a_feed_that_is_dropped_ends_its_thread() {
        let ids: Vec<u32> = (0..100).collect();
        let shard = shard_of(&ids, 1_000);
        let mut feed = Feed::new(Sampler::new(mixture_of(shard.clone()), 7, 1, "a").unwrap(), 2).unwrap();
        feed.next_batch().unwrap();
        assert_eq!(owners(&shard), 2);
        drop(feed);
        assert_eq!(owners(&shard), 1, "the thread held the sampler, and is gone");
    }

    #[test]
    fn buffers_are_filled_again() {
        let (filled, batches) = sync_channel(0);
        let (used, buffers) = channel();
        used.send(Vec::with_capacity(10_000)).unwrap();
        let thread = thread::spawn(move || fill(sampler(1_000), 1, &filled, &buffers));
        let first = batches.recv().unwrap().unwrap().tokens;
        assert!(first.capacity() >= 10_000 && first.len() == 8);
        assert!(batches.recv().unwrap().unwrap().tokens.capacity() < 10_000);
        drop(batches);
        thread.join().unwrap();
    }

    #[test]
    fn a_batch_that_is_there_costs_no_waiting() {
        let (filled, batches) = sync_channel(1);
        let (tokens, cursor) = expected(1, 1).remove(0);
        filled.send(Ok(Batch { tokens: tokens.clone(), cursor })).unwrap();
        let reader = Some(Reader { batches, used: channel().0, thread: thread::spawn(|| ()) });
        let (before, waited) = (Cursor::default(), Duration::ZERO);
        let mut feed = Feed { taken: None, before, put_back: false, waited, reader };
        assert_eq!(feed.next_batch().unwrap(), tokens);
        assert_eq!(feed.waited(), Duration::ZERO);
    }
}
