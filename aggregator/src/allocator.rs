//! What the system's allocator is told about threads: to share their memory.
//!
//! glibc gives threads up to eight arenas for each core, and keeps in each what was freed there. Buffers of chunks come
//! and go in all threads, so that each arena came to hold as many as ever were used in it at once: with four sites and
//! a model of 4 MB the aggregator grew to 140 MB within 75 rounds, and grows to 58 MB with two arenas, on two cores. To have
//! large buffers unmapped when they are freed (`M_MMAP_THRESHOLD`) made it 52 MB, and costs a fault for each page of each
//! buffer: with a model of 500 MB, half as much processor time again.

/// Two threads can allocate at a time, while others wait for a lock. One arena was as fast on two cores.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ARENAS_MAX: libc::c_int = 2;

/// From now on, threads share what memory was freed. To be called before there are threads. Another allocator than
/// glibc's is left as it is.
pub fn share_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt(3) takes no pointers, and sets a number that an allocation reads; glibc asks for no other thread
    // meanwhile, and the program has none yet. That it fails is no harm: there are then as many arenas as before.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX);
    }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use std::{hint::black_box, sync::mpsc, thread};

    use super::*;

    const BUFFER_BYTES: usize = 1 << 20;
    const BUFFERS: usize = 16;
    const THREADS: usize = 16;

    fn memory_bytes() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux has /proc");
        let resident =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        1024 * resident.and_then(|kilobytes| kilobytes.parse::<usize>().ok()).expect("a process has memory")
    }

    /// Buffers that are freed below what stays, so that the arena keeps them.
    fn use_buffers() -> Vec<u8> {
        let buffers: Vec<Vec<u8>> = (0..BUFFERS).map(|_| black_box(vec![1; BUFFER_BYTES])).collect();
        let stays = black_box(vec![1; 4000]);
        drop(buffers);
        stays
    }

    #[test]
    fn what_one_thread_has_freed_serves_the_others() {
        share_freed_memory();
        // The first that is freed makes buffers of its size come out of arenas.
        drop(black_box(vec![1u8; 2 * BUFFER_BYTES]));
        let before = memory_bytes();
        let (sender, receiver) = mpsc::channel();
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                let sender = sender.clone();
                let (go, wait) = mpsc::channel::<()>();
                let thread = thread::spawn(move || {
                    wait.recv().expect("it is told to go on");
                    let stays = use_buffers();
                    sender.send(()).expect("somebody listens");
                    // An arena is given to another thread when its own has ended.
                    let _ = wait.recv();
                    drop(stays);
                });
                (go, thread)
            })
            .collect();
        for (go, _) in &threads {
            go.send(()).expect("the thread waits");
            receiver.recv().expect("the thread is done");
        }
        let after = memory_bytes();
        for (go, thread) in threads {
            drop(go);
            thread.join().expect("no thread panics");
        }
        let one_each = THREADS * BUFFERS * BUFFER_BYTES;
        // Other tests of this process may use memory as well.
        assert!(after < before + one_each / 3, "{before} {after}");
        assert!(after > before + BUFFERS * BUFFER_BYTES / 2, "arenas keep what is freed: {before} {after}");
    }
}
