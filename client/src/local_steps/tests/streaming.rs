//! Rounds that synchronise a fragment while the site trains on.

use super::*;
use crate::transfer::Delta;

const ROUNDS: u32 = 5;

/// Seven chunks in three fragments.
fn streaming(overlap: u32, mixing: f64, encoding: Encoding) -> Site {
    let settings = format!(
        "[outer.streaming]\nfragments = 3\noverlap = {overlap}\nmixing = {mixing}\n[wire]\nchunk_parameters = 1024\n"
    );
    Site { encoding, ..Site::with(&settings) }
}

impl Site {
    /// What the aggregator makes of a federation of this site alone, without an outer optimizer.
    fn commit(&self, round: u32) {
        let fragment = self.material.fragment(round);
        let delta = Delta::open(&self.material.directory, round, fragment.plan()).unwrap();
        let encoded = std::fs::read(self.material.directory.delta(round)).unwrap();
        let codec = delta.description.encoding.codec();
        let mut global = ModelFile::open(&self.base).unwrap().values().to_vec();
        let chunk_bytes = codec.encoded_bytes(self.material.plan.chunk_parameters() as usize);
        for (values, payload) in fragment.slices_mut(&mut global).zip(encoded.chunks(chunk_bytes)) {
            let mut change = vec![0.0; values.len()];
            codec.decode(payload, &mut change).unwrap();
            values.iter_mut().zip(change).for_each(|(value, change)| *value += change);
        }
        let file = self.base.with_extension("new");
        std::fs::write(&file, bytemuck::cast_slice::<f32, u8>(&global)).unwrap();
        std::fs::rename(file, &self.base).unwrap();
    }

    fn ahead(&self, round: u32) -> Ahead {
        let job = self.job(round);
        Ahead {
            material: self.material.clone(),
            coming: Coming::this(&job.task),
            steps_taken: job.steps_ahead,
            cancel: job.cancel,
        }
    }

    /// Every round's local model and encoded delta, by a site whose process lives through all of them and takes the
    /// first steps of each round as soon as the round before has ended.
    fn undisturbed(&self) -> Vec<(Vec<u32>, Vec<u8>)> {
        let (mut trainer, mut held) = (self.trainer(), None);
        let rounds = (1..=ROUNDS).map(|round| {
            let local = self.train_on(&mut trainer, &mut held, round);
            assert!(self.ahead(round + 1).take(&mut trainer, &mut held).unwrap());
            self.finish(round, local)
        });
        rounds.collect()
    }

    fn finish(&self, round: u32, local: Vec<u32>) -> (Vec<u32>, Vec<u8>) {
        self.commit(round);
        (local, std::fs::read(self.material.directory.delta(round)).unwrap())
    }
}

#[test]
fn with_one_fragment_and_nothing_kept_or_overlapped_it_is_diloco_bit_for_bit() {
    for optimizer_state in ["keep", "reset"] {
        let settings = format!("optimizer_state = \"{optimizer_state}\"\n");
        let streaming = "[outer.streaming]\nfragments = 1\noverlap = 0\nmixing = 0.0\n";
        let plain = Site::with(&settings).undisturbed_plain();
        assert_eq!(Site::with(&format!("{settings}{streaming}")).undisturbed(), plain, "{optimizer_state}");
        let overlapping = "[outer.streaming]\nfragments = 1\noverlap = 1\nmixing = 0.0\n";
        assert_ne!(Site::with(&format!("{settings}{overlapping}")).undisturbed(), plain);
    }
}

impl Site {
    fn undisturbed_plain(&self) -> Vec<(Vec<u32>, Vec<u8>)> {
        let mut trainer = self.trainer();
        let rounds = (1..=ROUNDS).map(|round| {
            let local = self.train(&mut trainer, round);
            self.finish(round, local)
        });
        rounds.collect()
    }
}

#[test]
fn first_steps_that_are_interrupted_or_lost_give_the_same_bits() {
    for encoding in [Encoding::E3m0, Encoding::TwoBit] {
        let expected = streaming(3, 0.5, encoding).undisturbed();
        let site = streaming(3, 0.5, encoding);
        let (mut trainer, mut held) = (site.trainer(), None);
        let mut found = Vec::new();
        for round in 1..=ROUNDS {
            match round % 3 {
                // Killed while the delta is on its way: what was taken ahead is gone.
                0 => (trainer, held) = (site.trainer(), None),
                // Told to do something else after one of them, then killed after two steps of the rest.
                1 if round > 1 => {
                    let ahead = site.ahead(round);
                    ahead.cancel.cancel();
                    let error = ahead.take(&mut trainer, &mut held).unwrap_err();
                    assert!(matches!(error, WorkError::Cancelled), "{error}");
                    assert_eq!(held.as_ref().map(|held| held.progress.steps), Some(0));
                    site.interrupt(&mut trainer, round, 2);
                    (trainer, held) = (site.trainer(), None);
                }
                // Taken only when the round's model is there.
                _ => {}
            }
            let local = site.train_on(&mut trainer, &mut held, round);
            found.push(site.finish(round, local));
        }
        assert_eq!(found, expected);
    }
}

#[test]
fn a_round_that_is_computed_again_gives_the_same_delta() {
    let site = streaming(3, 0.5, Encoding::TwoBit);
    let (mut trainer, mut held) = (site.trainer(), None);
    for round in 1..=4 {
        let first = site.train_on(&mut trainer, &mut held, round);
        let delta = site.results(round);
        assert!(site.ahead(round + 1).take(&mut trainer, &mut held).unwrap());
        assert_eq!(site.train_on(&mut trainer, &mut held, round), first);
        assert_eq!(site.results(round), delta);
        site.commit(round);
    }
}

#[test]
fn a_site_that_missed_a_round_begins_with_the_global_model() {
    let site = streaming(3, 0.5, Encoding::Fp32);
    let mut trainer = site.trainer();
    site.train(&mut trainer, 1);
    site.commit(1);
    let mut held = None;
    assert!(!site.ahead(3).take(&mut trainer, &mut held).unwrap());
    let (progress, since) = begin(&mut trainer, &mut held, &site.job(3)).unwrap();
    assert_eq!(bits(&trainer.parameters().unwrap()), bits(ModelFile::open(&site.base).unwrap().values()));
    assert_eq!((progress.steps, since), (0, None));
    assert_ne!(progress.cursor, Cursor::default(), "its text goes on");
}
