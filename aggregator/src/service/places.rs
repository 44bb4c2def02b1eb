//! Places for transfers: bounded over all sites, and for each site, so that none takes the others'.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use consort_common::ids::{DeltaId, SiteName};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Downloads at a time of one site. A daemon needs one; a preflight beside it another.
const DOWNLOADS_PER_SITE_MAX: usize = 4;

/// RESOURCE_EXHAUSTED: all places are taken.
pub(super) fn no_room(what: &str) -> Status {
    Status::resource_exhausted(format!(
        "the aggregator has its maximum of {what} under way; retry in a few seconds"
    ))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Most calls that one upload, or one download, can be shared out to.
pub(super) const PARTS_MAX: u32 = 16;
/// Bytes that all sites together may have on their way unacknowledged, as far as they keep to what they are
/// told: the bulk of the aggregator's memory.
const WINDOWS_BYTES_MAX: u64 = 64 << 20;
/// Bytes that one call may have on their way at most. Sketch: 1 Gbit/s over a round trip of 100 ms is
/// 12.5 MB.
const WINDOW_BYTES_MAX: u64 = 16 << 20;

/// The chunks that one of several calls brings: those whose index modulo `parts` is `part`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    part: u32,
    parts: u32,
}

impl Share {
    /// # Errors
    /// INVALID_ARGUMENT if there is no such part. No parts are one.
    pub fn new(part: u32, parts: u32) -> Result<Self, Status> {
        let parts = parts.max(1);
        if parts > PARTS_MAX || part >= parts {
            return Err(Status::invalid_argument(format!(
                "part: is {part} of {parts}; allowed: below parts, which is at most {PARTS_MAX}"
            )));
        }
        Ok(Self { part, parts })
    }

    pub fn has(self, index: u32) -> bool {
        index % self.parts == self.part
    }

    /// Whether this call finishes the upload.
    pub fn finishes(self) -> bool {
        self.part == 0
    }
}

/// The uploads under way: one delta per site. A call that brings another delta, or the same part again,
/// supersedes what there is, whose connection is then most likely dead without anybody having noticed.
#[derive(Debug)]
pub(super) struct Uploads {
    sites_max: usize,
    by_site: Mutex<BTreeMap<SiteName, SiteUpload>>,
}

/// What one site uploads.
#[derive(Debug)]
struct SiteUpload {
    delta: DeltaId,
    parts: u32,
    /// The calls, by part.
    calls: BTreeMap<u32, CancellationToken>,
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// One call's place.
#[derive(Debug)]
pub(super) struct UploadPlace {
    uploads: Arc<Uploads>,
    site: SiteName,
    part: u32,
    superseded: CancellationToken,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Uploads {
    /// Places for the uploads of so many sites at a time.
    pub fn new(sites_max: usize) -> Arc<Self> {
        Arc::new(Self { sites_max, by_site: Mutex::default() })
    }

    /// A place for a call of `site` that brings a share of `delta`.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED if too many other sites upload.
    pub fn enter(
        self: &Arc<Self>,
        site: &SiteName,
        delta: DeltaId,
        share: Share,
    ) -> Result<UploadPlace, Status> {
        let mut by_site = lock(&self.by_site);
        if !by_site.contains_key(site) && by_site.len() >= self.sites_max {
            return Err(no_room("uploads"));
        }
        let upload = by_site.entry(site.clone()).or_insert_with(|| SiteUpload {
            delta,
            parts: share.parts,
            calls: BTreeMap::new(),
            turn: Arc::default(),
        });
        if (upload.delta, upload.parts) != (delta, share.parts) {
            std::mem::take(&mut upload.calls).into_values().for_each(|call| call.cancel());
            (upload.delta, upload.parts) = (delta, share.parts);
        }
        let superseded = CancellationToken::new();
        if let Some(last) = upload.calls.insert(share.part, superseded.clone()) {
            last.cancel();
        }
        let turn = upload.turn.clone();
        Ok(UploadPlace { uploads: self.clone(), site: site.clone(), part: share.part, superseded, turn })
    }
}

impl UploadPlace {
    /// Completes once another call has taken this one's place.
    pub async fn superseded(&self) -> Status {
        self.superseded.cancelled().await;
        self.refusal()
    }

    /// Bytes of chunks that this call may have on their way unacknowledged now.
    pub fn window_bytes(&self) -> u64 {
        let by_site = lock(&self.uploads.by_site);
        let calls: usize = by_site.values().map(|upload| upload.calls.len()).sum();
        (WINDOWS_BYTES_MAX / calls.max(1) as u64).min(WINDOW_BYTES_MAX)
    }

    /// Does `work`, which begins an upload of the site or ends one, while no other call of the site does,
    /// and not at all if this one is superseded: what is being accepted is not discarded.
    ///
    /// # Errors
    /// CANCELLED if superseded, or those of `work`.
    pub async fn exclusively<T>(&self, work: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let _turn = self.turn.lock().await;
        if self.superseded.is_cancelled() {
            return Err(self.refusal());
        }
        work.await
    }

    fn refusal(&self) -> Status {
        Status::cancelled(format!("another upload of site {} began and takes this one's place", self.site))
    }
}

impl Drop for UploadPlace {
    fn drop(&mut self) {
        let mut by_site = lock(&self.uploads.by_site);
        // A place that was superseded belongs to the next one.
        if self.superseded.is_cancelled() {
            return;
        }
        if let Some(upload) = by_site.get_mut(&self.site) {
            upload.calls.remove(&self.part);
            if upload.calls.is_empty() {
                by_site.remove(&self.site);
            }
        }
    }
}

/// The downloads under way.
#[derive(Debug)]
pub(super) struct Downloads {
    all: Arc<Semaphore>,
    /// Grows with the sites that the federation's CA has named, and no further.
    by_site: Mutex<BTreeMap<SiteName, Arc<Semaphore>>>,
}

/// One download's place.
#[derive(Debug)]
pub(super) struct DownloadPlace {
    _of_site: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Downloads {
    /// Places for so many downloads at a time.
    pub fn new(downloads_max: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(downloads_max)), by_site: Mutex::default() }
    }

    /// A place for a download of `site`.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED if there is none, over all sites or for this one.
    pub fn enter(&self, site: &SiteName) -> Result<DownloadPlace, Status> {
        let of_site = lock(&self.by_site)
            .entry(site.clone())
            .or_insert_with(|| Arc::new(Semaphore::new(DOWNLOADS_PER_SITE_MAX)))
            .clone();
        let what = format!("downloads of site {site}");
        let of_site = of_site.try_acquire_owned().map_err(|_| no_room(&what))?;
        let of_all = self.all.clone().try_acquire_owned().map_err(|_| no_room("downloads"))?;
        Ok(DownloadPlace { _of_site: of_site, _of_all: of_all })
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn site(name: &str) -> SiteName {
        name.parse().unwrap()
    }

    async fn is_current(place: &UploadPlace) -> bool {
        match place.exclusively(async { Ok(()) }).await {
            Ok(()) => true,
            Err(status) => {
                assert_eq!(status.code(), Code::Cancelled);
                false
            }
        }
    }

    const WHOLE: Share = Share { part: 0, parts: 1 };

    fn enter(uploads: &Arc<Uploads>, name: &str, delta: u8, share: Share) -> Result<UploadPlace, Status> {
        uploads.enter(&site(name), [delta; 16].into(), share)
    }

    #[tokio::test]
    async fn a_sites_next_upload_supersedes_its_last_and_no_other_sites() {
        let uploads = Uploads::new(2);
        let first = enter(&uploads, "a", 1, WHOLE).unwrap();
        let other = enter(&uploads, "b", 1, WHOLE).unwrap();
        let second = enter(&uploads, "a", 1, WHOLE).unwrap();
        assert!(!is_current(&first).await && is_current(&second).await && is_current(&other).await);
        assert_eq!(first.superseded().await.code(), Code::Cancelled);
        // Its place is the second's: leaving frees none.
        drop(first);
        assert_eq!(enter(&uploads, "c", 1, WHOLE).unwrap_err().code(), Code::ResourceExhausted);
        drop(second);
        let third = enter(&uploads, "c", 1, WHOLE).unwrap();
        assert!(is_current(&third).await);
    }

    #[tokio::test]
    async fn parts_of_one_delta_go_side_by_side_and_another_delta_supersedes_them_all() {
        let uploads = Uploads::new(1);
        let part = |part| Share::new(part, 3).unwrap();
        let [first, second] = [0, 1].map(|index| enter(&uploads, "a", 1, part(index)).unwrap());
        assert!(is_current(&first).await && is_current(&second).await);
        let again = enter(&uploads, "a", 1, part(1)).unwrap();
        assert!(is_current(&first).await && !is_current(&second).await && is_current(&again).await);
        let other = enter(&uploads, "a", 2, WHOLE).unwrap();
        assert!(!is_current(&first).await && !is_current(&again).await && is_current(&other).await);
        drop((first, second, again));
        assert!(is_current(&other).await);
        drop(other);
        enter(&uploads, "b", 1, WHOLE).unwrap();
    }

    #[test]
    fn parts_share_out_all_chunks() {
        for parts in 1..=PARTS_MAX {
            let shares: Vec<_> = (0..parts).map(|part| Share::new(part, parts).unwrap()).collect();
            for index in 0..100 {
                assert_eq!(shares.iter().filter(|share| share.has(index)).count(), 1);
            }
        }
        assert_eq!(Share::new(0, 0).unwrap(), WHOLE);
        for (part, parts) in [(1, 1), (3, 2), (0, PARTS_MAX + 1), (u32::MAX, u32::MAX)] {
            assert_eq!(Share::new(part, parts).unwrap_err().code(), Code::InvalidArgument);
        }
    }

    #[test]
    fn windows_shrink_as_sites_come() {
        let uploads = Uploads::new(100);
        let mut places = Vec::new();
        for index in 0..64 {
            places.push(enter(&uploads, &format!("site-{index}"), 1, WHOLE).unwrap());
            let total = places[0].window_bytes() * places.len() as u64;
            assert!(total <= WINDOWS_BYTES_MAX && places[0].window_bytes() <= WINDOW_BYTES_MAX);
        }
        places.truncate(1);
        assert_eq!(places[0].window_bytes(), WINDOW_BYTES_MAX);
    }

    #[tokio::test]
    async fn the_next_upload_waits_for_work_that_its_predecessor_has_begun() {
        let uploads = Uploads::new(1);
        let first = enter(&uploads, "a", 1, WHOLE).unwrap();
        let (finish, finished) = tokio::sync::oneshot::channel::<()>();
        let mut work = Box::pin(first.exclusively(async { Ok(finished.await.is_ok()) }));
        assert!(futures::poll!(&mut work).is_pending());
        let second = enter(&uploads, "a", 2, WHOLE).unwrap();
        let mut next = Box::pin(second.exclusively(async { Ok(()) }));
        assert!(futures::poll!(&mut next).is_pending());
        finish.send(()).unwrap();
        assert!(work.await.unwrap());
        next.await.unwrap();
    }

    #[test]
    fn one_site_does_not_take_all_downloads() {
        let downloads = Downloads::new(DOWNLOADS_PER_SITE_MAX + 1);
        let places: Vec<_> =
            (0..DOWNLOADS_PER_SITE_MAX).map(|_| downloads.enter(&site("a")).unwrap()).collect();
        assert!(downloads.enter(&site("a")).unwrap_err().message().contains("site a"));
        let other = downloads.enter(&site("b")).unwrap();
        assert_eq!(downloads.enter(&site("b")).unwrap_err().code(), Code::ResourceExhausted);
        drop((places, other));
        downloads.enter(&site("a")).unwrap();
    }
}
