//! Places for transfers: bounded over all sites, and for each site, so that none takes the others'.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use consort_common::ids::SiteName;
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

/// The uploads under way: one per site. A site's next upload supersedes its last, whose connection is then
/// most likely dead without anybody having noticed.
#[derive(Debug)]
pub(super) struct Uploads {
    sites_max: usize,
    current: Mutex<BTreeMap<SiteName, Current>>,
}

#[derive(Debug, Clone)]
struct Current {
    superseded: CancellationToken,
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// One upload's place.
#[derive(Debug)]
pub(super) struct UploadPlace {
    uploads: Arc<Uploads>,
    site: SiteName,
    current: Current,
}

impl Uploads {
    /// Places for the uploads of so many sites at a time.
    pub fn new(sites_max: usize) -> Arc<Self> {
        Arc::new(Self { sites_max, current: Mutex::default() })
    }

    /// A place for an upload of `site`; the one that the site has under way is superseded.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED if too many other sites upload.
    pub fn enter(self: &Arc<Self>, site: &SiteName) -> Result<UploadPlace, Status> {
        let mut all = lock(&self.current);
        let last = all.get(site);
        if last.is_none() && all.len() >= self.sites_max {
            return Err(no_room("uploads"));
        }
        if let Some(last) = last {
            last.superseded.cancel();
        }
        let turn = last.map(|last| last.turn.clone()).unwrap_or_default();
        let current = Current { superseded: CancellationToken::new(), turn };
        all.insert(site.clone(), current.clone());
        Ok(UploadPlace { uploads: self.clone(), site: site.clone(), current })
    }
}

impl UploadPlace {
    /// Completes once the site's next upload has begun.
    pub async fn superseded(&self) -> Status {
        self.current.superseded.cancelled().await;
        self.refusal()
    }

    /// Does `work`, which touches what is spooled of the site or whether it counts, while no other upload
    /// of the site does, and not at all if this one is superseded. Chunks of two uploads are thus never
    /// mixed, and what is being accepted is not overwritten.
    ///
    /// # Errors
    /// CANCELLED if superseded, or those of `work`.
    pub async fn exclusively<T>(&self, work: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let _turn = self.current.turn.lock().await;
        if self.current.superseded.is_cancelled() {
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
        let mut all = lock(&self.uploads.current);
        // A place that was superseded belongs to the next one.
        if !self.current.superseded.is_cancelled() {
            all.remove(&self.site);
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

    #[tokio::test]
    async fn a_sites_next_upload_supersedes_its_last_and_no_other_sites() {
        let uploads = Uploads::new(2);
        let (first, other) = (uploads.enter(&site("a")).unwrap(), uploads.enter(&site("b")).unwrap());
        let second = uploads.enter(&site("a")).unwrap();
        assert!(!is_current(&first).await && is_current(&second).await && is_current(&other).await);
        assert_eq!(first.superseded().await.code(), Code::Cancelled);
        // Its place is the second's: leaving frees none.
        drop(first);
        assert_eq!(uploads.enter(&site("c")).unwrap_err().code(), Code::ResourceExhausted);
        drop(second);
        let third = uploads.enter(&site("c")).unwrap();
        assert!(is_current(&third).await);
    }

    #[tokio::test]
    async fn the_next_upload_waits_for_work_that_its_predecessor_has_begun() {
        let uploads = Uploads::new(1);
        let first = uploads.enter(&site("a")).unwrap();
        let (finish, finished) = tokio::sync::oneshot::channel::<()>();
        let mut work = Box::pin(first.exclusively(async { Ok(finished.await.is_ok()) }));
        assert!(futures::poll!(&mut work).is_pending());
        let second = uploads.enter(&site("a")).unwrap();
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
