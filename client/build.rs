//! Compiles the C++ shim over libtorch and tells the linker where libtorch lies, now and at
//! run time. The build script of torch-sys cannot do the latter: link arguments reach only
//! the targets of the package whose build script prints them.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

fn main() {
    // Set by torch-sys, whichever way it was told where libtorch is.
    let lib_dir = PathBuf::from(variable("DEP_TCH_LIBTORCH_LIB"));
    let lib_dir = lib_dir.canonicalize().unwrap_or(lib_dir);
    // Naming a file that is missing makes cargo run this script again, so that a libtorch
    // deleted after a build is reported here and not by the linker.
    let library = lib_dir.join("libtorch.so");
    println!("cargo::rerun-if-changed={}", library.display());
    if !library.exists() {
        println!(
            "cargo::error=libtorch is not set up in this checkout ({} is missing): run deploy/libtorch (or set \
             LIBTORCH to a libtorch 2.13.0), then build again",
            library.display()
        );
        return;
    }
    compile_shim(&lib_dir);
    link(&lib_dir);
}

/// Compiles the shim with the flags that torch-sys uses: both share libtorch's C++ types.
fn compile_shim(lib_dir: &Path) {
    for file in ["guarded.h", "kernels.cpp", "shim.cpp"] {
        println!("cargo::rerun-if-changed=src/trainer/{file}");
    }
    println!("cargo::rerun-if-env-changed=LIBTORCH_INCLUDE");
    println!("cargo::rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    let home = env::var_os("LIBTORCH_INCLUDE").map_or_else(|| lib_dir.join(".."), PathBuf::from);
    let cxx11_abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        // As system headers, libtorch's own warnings stay out of our build.
        .flag("-isystem")
        .flag(home.join("include"))
        .flag("-isystem")
        .flag(home.join("include/torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", cxx11_abi.as_str())
        .files(["src/trainer/shim.cpp", "src/trainer/kernels.cpp"])
        .compile("consort_shim");
}

/// Links libtorch and records where the program finds it when it starts.
fn link(lib_dir: &Path) {
    // Nothing refers to a symbol of libtorch.so itself, yet loading it is what brings in
    // the CUDA backend: without this, a program sees no GPU.
    println!("cargo::rustc-link-arg=-Wl,--no-as-needed");
    println!("cargo::rustc-link-arg=-ltorch");
    // Searched in this order. Relative to the program first, so that a checkout that has
    // its own libtorch can be moved with what was built in it.
    for path in relative_paths(lib_dir) {
        println!("cargo::rustc-link-arg=-Wl,-rpath,$ORIGIN/{}", path.display());
    }
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib_dir.display());
}

/// The way from a binary (`target/PROFILE/`) and from a test or example (one folder deeper)
/// to libtorch, if both lie in this checkout. Elsewhere a relative path would stand for a
/// folder that anyone may own.
fn relative_paths(lib_dir: &Path) -> Vec<PathBuf> {
    let package = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let checkout = package.parent().expect("the package lies in a workspace");
    // OUT_DIR is target/PROFILE/build/PACKAGE-HASH/out.
    let out_dir = PathBuf::from(variable("OUT_DIR"));
    let profile_dir = out_dir.ancestors().nth(3).expect("OUT_DIR lies in the target folder");
    let (Ok(to_lib), Ok(to_profile)) = (lib_dir.strip_prefix(checkout), profile_dir.strip_prefix(checkout))
    else {
        return Vec::new();
    };
    let up_to_checkout: PathBuf = to_profile.components().map(|_| "..").collect();
    let from_binary = up_to_checkout.join(to_lib);
    vec![from_binary.clone(), Path::new("..").join(from_binary)]
}

fn variable(name: &str) -> OsString {
    env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set: this runs under cargo, with torch-sys as a dependency"))
}
