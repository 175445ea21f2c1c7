//! Compiles `shim/`, against the libtorch that the `tch` crate uses.

use std::env;
use std::path::PathBuf;

fn main() {
    for variable in ["LIBTORCH", "LIBTORCH_INCLUDE", "LIBTORCH_CXX11_ABI"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=shim");
    let folder = env::var_os("LIBTORCH_INCLUDE").or_else(|| env::var_os("LIBTORCH"));
    // `.cargo/config.toml` sets it.
    let include = PathBuf::from(folder.expect("LIBTORCH is set")).join("include");
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    cc::Build::new()
        .cpp(true)
        .pic(true)
        .std("c++17")
        // libtorch's own headers are full of them.
        .warnings(false)
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .includes([include.join("torch/csrc/api/include"), include])
        .file("shim/shim.cpp")
        .compile("everstep_shim");
}
