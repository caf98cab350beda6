#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hooktrail::fuzzing::redact(bytes));
