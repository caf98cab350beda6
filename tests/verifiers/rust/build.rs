//! Takes the Rust snippet out of docs/receivers.md, so that the document's own text is what runs.

fn main() {
    let path = "../../../docs/receivers.md";
    println!("cargo::rerun-if-changed={path}");
    let text = std::fs::read_to_string(path).expect("the document");
    let snippet = text
        .split("```rust\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .expect("a Rust snippet");
    let out = std::env::var("OUT_DIR").expect("cargo sets it");
    std::fs::write(format!("{out}/snippet.rs"), snippet).expect("writes");
}
