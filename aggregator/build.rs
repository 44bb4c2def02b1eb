//! `sqlx::migrate!` embeds a folder that the compiler does not watch by itself.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
