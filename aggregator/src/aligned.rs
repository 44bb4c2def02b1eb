//! Vectors that begin where copies into them are fast.
//!
//! What the allocator gives for a vector of a mebibyte begins 16 bytes after a page. Where the system copies
//! with `rep movsb`, a read from the page cache into it went at 8.8 GB/s on the machine of the README's
//! figures, and at 19 GB/s into one that begins at a cache line; and every load of a whole line from it
//! touches two.

use std::ops::{Deref, DerefMut};

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// A vector of numbers that begins at a multiple of 64 bytes.
#[derive(Debug, Default)]
pub struct AlignedVec<T> {
    /// With room for the values wherever they begin.
    room: Vec<T>,
    length: usize,
}

impl<T: Copy + Default> AlignedVec<T> {
    /// Gives the vector that length. What it holds then is unspecified.
    pub fn resize(&mut self, length: usize) {
        let needed = length + LINE_BYTES / size_of::<T>();
        if self.room.len() < needed {
            self.room.resize(needed, T::default());
        }
        self.length = length;
    }
}

impl<T> Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        let begin = self.room.as_ptr().align_offset(LINE_BYTES);
        self.room.get(begin..).and_then(|room| room.get(..self.length)).unwrap_or_default()
    }
}

impl<T> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let begin = self.room.as_ptr().align_offset(LINE_BYTES);
        self.room.get_mut(begin..).and_then(|room| room.get_mut(..self.length)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Copy + Default>() {
        let mut vector = AlignedVec::<T>::default();
        assert!(vector.is_empty());
        for length in [1, 7, 1 << 18, 3, 0, 100_000] {
            vector.resize(length);
            assert_eq!((vector.len(), vector.as_ptr().align_offset(LINE_BYTES)), (length, 0));
            vector.fill(T::default());
            let begin = vector.as_ptr();
            assert_eq!(vector.as_mut_ptr().cast_const(), begin);
        }
    }

    #[test]
    fn vectors_have_their_length_and_begin_at_a_line() {
        check::<u8>();
        check::<f32>();
        check::<f64>();
    }
}
