//! Properties that must hold for untrusted bytes: the bodies of the fuzz targets in `fuzz/`. The
//! tests below run them over the corpora there. This is compiled for `cargo fuzz` and for tests
//! only.

mod broker;
mod configuration;
mod events;
mod intake;
mod json;
mod receiver;

pub use self::{
    broker::{message, story, wire},
    configuration::config,
    events::{event, pattern, redact, splice},
    intake::intake,
    receiver::{retry_after, signature},
};

/// A function that tries one input, and panics if a property does not hold.
pub type Target = fn(&[u8]);

/// All targets. Each has a file, a corpus and a `[[bin]]` of its name in `fuzz/`.
pub const TARGETS: &[(&str, Target)] = &[
    ("config", config),
    ("event", event),
    ("intake", intake),
    ("message", message),
    ("pattern", pattern),
    ("redact", redact),
    ("retry_after", retry_after),
    ("signature", signature),
    ("splice", splice),
    ("story", story),
    ("wire", wire),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeSet, path::Path};

    fn folder(name: &str) -> BTreeSet<String> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(name);
        let entries =
            std::fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn what_must_hold_for_strangers_bytes_holds_for_the_corpora() {
        for (name, target) in TARGETS {
            let files = folder(&format!("corpus/{name}"));
            assert!(files.len() > 3, "the corpus of {name} has {} files", files.len());
            for file in files {
                let path = Path::new(env!("CARGO_MANIFEST_DIR"))
                    .join("fuzz/corpus")
                    .join(name)
                    .join(&file);
                println!("{name}: {file}");
                target(&std::fs::read(path).unwrap());
            }
        }
    }

    #[test]
    fn each_target_has_its_program_its_dictionary_and_its_corpus() {
        let names: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(folder("corpus"), names);
        assert_eq!(folder("fuzz_targets"), names.iter().map(|name| format!("{name}.rs")).collect());
        assert_eq!(
            folder("dictionaries"),
            names.iter().map(|name| format!("{name}.dict")).collect()
        );
        let manifest =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/Cargo.toml"))
                .unwrap();
        for name in names {
            assert!(
                manifest
                    .contains(&format!("name = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"\n")),
                "no [[bin]] {name}"
            );
        }
    }
}
