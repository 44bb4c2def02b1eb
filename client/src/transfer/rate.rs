//! A limit on bytes per second, shared by all connections of the daemon in one direction.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

/// A token bucket that holds one chunk: each chunk reserves its time on the line, and goes when the chunks
/// before it have had theirs. Over any while the bytes that passed are at most `bytes_per_second` times the
/// while, and one chunk.
#[derive(Debug)]
pub(super) struct RateLimit {
    /// 0: no limit.
    bytes_per_second: u64,
    /// When the chunks that were let through so far have had their time.
    free_at: Mutex<Instant>,
}

impl RateLimit {
    /// At most so many bytes per second; 0: no limit.
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until so many bytes may pass. The time is taken even if the future is then dropped.
    pub(super) async fn pass(&self, bytes: usize) {
        if self.bytes_per_second == 0 {
            return;
        }
        #[allow(clippy::cast_precision_loss)]
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let begins = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let begins = (*free_at).max(Instant::now());
            *free_at = begins + takes;
            begins
        };
        sleep_until(begins).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn chunks_of_all_connections_share_the_limit() {
        let limit = RateLimit::new(1_000);
        let began = Instant::now();
        let connection = async || {
            for _ in 0..5 {
                limit.pass(200).await;
            }
        };
        tokio::join!(connection(), connection());
        assert!(began.elapsed() >= Duration::from_millis(1_800), "{:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_millis(1_900), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn time_without_transfers_is_not_saved_up() {
        let limit = RateLimit::new(1_000);
        limit.pass(1_000).await;
        tokio::time::sleep(Duration::from_secs(3600)).await;
        let began = Instant::now();
        for _ in 0..3 {
            limit.pass(1_000).await;
        }
        assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_nothing_waits() {
        let began = Instant::now();
        RateLimit::new(0).pass(usize::MAX).await;
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
