//! The compute device: the one place where it is chosen, described and measured, and where numbers from
//! the host are moved to it. All other code is the same on every device.

use std::{collections::BTreeSet, fmt, os::unix::process::CommandExt, process::Command, str::FromStr};

use serde::{Deserialize, Serialize};
use sysinfo::{MemoryRefreshKind, System};
pub use tch::Device;
use tch::{Cuda, Kind, TchError, Tensor};

use super::shim::{self, ShimError};

/// The device that a configuration asks for: "auto", "cpu", "cuda" or "cuda:N".
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first GPU if there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU with this index.
    Cuda(usize),
}

/// Why there is no such device.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum DeviceError {
    /// Not one of the texts that name a device.
    #[error("{0:?} names no device: use \"auto\", \"cpu\", \"cuda\" or \"cuda:N\"")]
    Unknown(String),
    /// The libtorch that this program is linked with knows no CUDA.
    #[error(
        "cannot use cuda:{0}: this program's libtorch is the one without CUDA; run deploy/libtorch --cuda and build \
         again, or set the device to \"cpu\""
    )]
    NoCuda(usize),
    /// No such GPU.
    #[error(
        "cannot use cuda:{index}: {count} CUDA devices are visible; check nvidia-smi and CUDA_VISIBLE_DEVICES, or set \
         the device to \"auto\" or \"cpu\""
    )]
    Missing {
        /// The index asked for.
        index: usize,
        /// Devices that libtorch sees.
        count: usize,
    },
    /// libtorch refused.
    #[error(transparent)]
    Libtorch(#[from] ShimError),
}

impl FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Unknown(text.chars().take(40).collect());
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let index = text.strip_prefix("cuda:").ok_or_else(unknown)?;
                index.parse().map(Self::Cuda).map_err(|_| unknown())
            }
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = DeviceError;

    fn try_from(text: String) -> Result<Self, DeviceError> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl DeviceChoice {
    /// The device meant, on this machine.
    ///
    /// # Errors
    /// There is no such GPU, or this program's libtorch knows none.
    pub fn open(self) -> Result<Device, DeviceError> {
        let count = usize::try_from(Cuda::device_count()).unwrap_or(0);
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Auto => Ok(if count == 0 { Device::Cpu } else { Device::Cuda(0) }),
            Self::Cuda(index) if index < count => Ok(Device::Cuda(index)),
            Self::Cuda(index) if count == 0 && !tch::utils::has_cudart() => Err(DeviceError::NoCuda(index)),
            Self::Cuda(index) => Err(DeviceError::Missing { index, count }),
        }
    }
}

/// How many threads the CPU uses for one operation; 0: all cores. Holds for the whole process; the order of
/// sums within an operation, and thus their last bits, depends on it.
pub fn set_threads(threads: usize) {
    let threads = match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
}

/// Starts this program anew with what libraries take from the environment alone, some of them when they are loaded,
/// unless all of it is set already, to whatever, or the system refuses. To be called first in `main`.
///
/// `OMP_WAIT_POLICY=passive` lets the CPU's threads sleep while they wait for each other. By default they spin, which
/// is no faster, and ruinous when others want the cores: two trainers with 2 threads each on 2 cores made 600 tokens/s
/// each spinning, and 9,600 sleeping. `CUBLAS_WORKSPACE_CONFIG` is what cuBLAS wants to be deterministic, for
/// [`be_deterministic`]: it costs 8 times 4 MiB of a GPU's memory.
pub fn set_up_libraries() {
    const WANTED: [(&str, &str); 2] =
        [("OMP_WAIT_POLICY", "passive"), ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")];
    let missing: Vec<_> = WANTED.into_iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect();
    if missing.is_empty() {
        return;
    }
    let mut arguments = std::env::args_os();
    let (Ok(program), Some(name)) = (std::env::current_exe(), arguments.next()) else { return };
    let error = Command::new(program).arg0(name).args(arguments).envs(missing.clone()).exec();
    let missing: Vec<_> = missing.iter().map(|(name, value)| format!("{name}={value}")).collect();
    eprintln!("cannot start anew with {} in the environment: {error}", missing.join(" "));
}

/// The device for people: "cpu (2 threads)", "cuda:0 (NVIDIA H200, 139 GiB)".
pub fn describe(device: Device) -> String {
    let Device::Cuda(index) = device else {
        let threads = tch::get_num_threads();
        return format!("cpu ({threads} thread{})", if threads == 1 { "" } else { "s" });
    };
    let model = gpu_model().unwrap_or_else(|| "NVIDIA GPU".to_owned());
    match memory(device) {
        Ok(memory) => format!("cuda:{index} ({model}, {} GiB)", memory.total_bytes >> 30),
        Err(_) => format!("cuda:{index} ({model})"),
    }
}

/// What the driver calls the machine's GPUs, if they are all alike: its numbering is not CUDA's.
fn gpu_model() -> Option<String> {
    let mut models = BTreeSet::new();
    for folder in std::fs::read_dir("/proc/driver/nvidia/gpus").ok()? {
        let information = std::fs::read_to_string(folder.ok()?.path().join("information")).ok()?;
        models.insert(information.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_owned());
    }
    let model = models.pop_first()?;
    models.is_empty().then_some(model)
}

/// What the device can do at best, in floating-point operations per second, by the maker's data sheets (dense, at
/// boost clock): in bf16 with sums in fp32, else in fp32 without tensor cores. `None` for a CPU, and for GPUs
/// that are not known here.
pub fn peak_flops(device: Device, bf16: bool) -> Option<f64> {
    // By a part of the driver's name, the first that fits; in 10^12 for bf16 and fp32.
    const PEAKS: [(&str, f64, f64); 7] = [
        ("H100 PCIe", 756.0, 51.0),
        ("H100", 989.0, 67.0),
        ("H200", 989.0, 67.0),
        ("B200", 2250.0, 80.0),
        ("A100", 312.0, 19.5),
        ("L40S", 362.0, 91.6),
        ("RTX 4090", 165.2, 82.6),
    ];
    let model = device.is_cuda().then(gpu_model).flatten()?;
    let (_, peak_bf16, peak_fp32) = PEAKS.iter().find(|(name, ..)| model.contains(name))?;
    Some(1e12 * if bf16 { peak_bf16 } else { peak_fp32 })
}

/// Gives memory back that the device's allocator keeps for later, so that pieces of it become whole again.
pub(super) fn release_unused(device: Device) {
    if device.is_cuda() {
        // What cannot be given back stays.
        let _ = shim::release_cuda_cache();
    }
}

/// From now on, computes the same bits from the same numbers, which a CPU does in any case: a GPU then takes
/// slower kernels for attention and for the gradient of the embedding. Holds for the whole process.
///
/// # Errors
/// libtorch refused.
pub fn be_deterministic(device: Device) -> Result<(), DeviceError> {
    if device.is_cuda() {
        shim::set_deterministic()?;
    }
    Ok(())
}

/// Waits until the device has done all that it was given.
pub(super) fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// A device's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// What can be allocated now.
    pub available_bytes: u64,
    /// What there is.
    pub total_bytes: u64,
}

/// The memory of a device: for the CPU that of the machine, or of the container where that is less.
///
/// # Errors
/// The GPU did not answer.
pub fn memory(device: Device) -> Result<Memory, ShimError> {
    if let Device::Cuda(index) = device {
        let (available_bytes, total_bytes) = shim::cuda_memory(index)?;
        return Ok(Memory { available_bytes, total_bytes });
    }
    let mut system = System::new();
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    let machine = Memory { available_bytes: system.available_memory(), total_bytes: system.total_memory() };
    Ok(system.cgroup_limits().map_or(machine, |limits| Memory {
        available_bytes: machine.available_bytes.min(limits.free_memory),
        total_bytes: machine.total_bytes.min(limits.total_memory),
    }))
}

/// The most memory that computing took at once, in bytes: on a GPU what this process's tensors held of its memory,
/// attempts that failed included, on the CPU all that this process held. `None` where neither libtorch nor the system
/// says.
pub fn peak_memory(device: Device) -> Option<u64> {
    if let Device::Cuda(index) = device {
        return shim::cuda_peak_memory(index).ok();
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
}

/// Tokens as an int64 tensor of `shape` on the device. To a GPU they go through pinned memory, so that the
/// host does not wait for the steps under way there.
///
/// The caller has checked that `shape` holds as many.
pub(super) fn upload(tokens: &[i64], shape: &[i64], device: Device) -> Result<Tensor, TchError> {
    let host = Tensor::f_from_slice(tokens)?.f_view(shape)?;
    if !device.is_cuda() {
        return Ok(host);
    }
    shim::pinned(&host)?.f_internal_to_copy((Kind::Int64, device), true)
}

/// Where tests compute: `CONSORT_TEST_DEVICE`, or else the CPU, with one thread, since tests run beside each other.
#[cfg(test)]
pub(crate) fn test_device() -> Device {
    set_threads(1);
    let name = std::env::var("CONSORT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    name.parse::<DeviceChoice>().unwrap().open().unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_in_the_configuration() {
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:3", DeviceChoice::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(choice));
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert_eq!(text.parse::<DeviceChoice>(), Err(DeviceError::Unknown(text.to_owned())));
        }
    }

    #[test]
    fn a_missing_gpu_is_an_error_that_says_what_to_do() {
        let error = DeviceChoice::Cuda(99).open().unwrap_err().to_string();
        assert!(error.starts_with("cannot use cuda:99: ") && error.contains("\"cpu\""), "{error}");
    }

    #[test]
    fn the_cpu_is_described_with_its_threads_and_has_memory() {
        set_threads(1);
        assert_eq!(describe(Device::Cpu), "cpu (1 thread)");
        let memory = memory(Device::Cpu).unwrap();
        assert!(0 < memory.available_bytes && memory.available_bytes <= memory.total_bytes, "{memory:?}");
        let peak = peak_memory(Device::Cpu).unwrap();
        assert!((1 << 20..memory.total_bytes).contains(&peak), "{peak}");
    }
}
