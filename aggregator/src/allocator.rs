//! What the system's allocator is told about buffers of a chunk's size: to give them back.
//!
//! glibc maps large buffers from the system and unmaps them again, but counts as large only what is larger than any
//! such buffer that was freed so far. After the first chunk, buffers of chunks thus come out of the threads' arenas,
//! of which there are eight for each core, and stay there. With four sites and a model of 3 MB the aggregator grew to
//! 103 MB within 75 rounds, and to 45 MB with this threshold; with a model of 250 MB to 200 MB, and to 115 MB with one
//! of 128 KiB, for 3 % more of its processor time.

#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE_BYTES: libc::c_int = 256 << 10;

/// From now on, large buffers are given back to the system as soon as they are freed. To be called before there are
/// threads. Another allocator than glibc's is left as it is.
pub fn give_back_large_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt(3) takes no pointers, and sets a number that an allocation reads; glibc asks for no other thread
    // meanwhile, and the program has none yet. That it fails is no harm: the threshold is then as it was.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES);
    }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use std::hint::black_box;

    use super::*;

    const BUFFER_BYTES: usize = 1 << 20;
    const BUFFERS: usize = 256;

    fn memory_bytes() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux has /proc");
        let resident =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        1024 * resident.and_then(|kilobytes| kilobytes.parse::<usize>().ok()).expect("a process has memory")
    }

    #[test]
    fn buffers_of_chunks_are_given_back_though_smaller_ones_beside_them_stay() {
        give_back_large_buffers();
        // The first that is freed would make it the largest that is kept.
        drop(black_box(vec![1u8; BUFFER_BYTES]));
        let before = memory_bytes();
        let mut kept = Vec::new();
        let buffers: Vec<Vec<u8>> = (0..BUFFERS)
            .map(|_| {
                kept.push(vec![1u8; 1000]);
                vec![1; BUFFER_BYTES]
            })
            .collect();
        let during = memory_bytes();
        kept.push(vec![1; 1000]);
        drop(buffers);
        let after = memory_bytes();
        assert_eq!(kept.len(), BUFFERS + 1);
        // Other tests of this process may use memory as well.
        assert!(during > before + BUFFERS * BUFFER_BYTES / 2, "{before} {during}");
        assert!(after < before + BUFFERS * BUFFER_BYTES / 4, "{before} {during} {after}");
    }
}
