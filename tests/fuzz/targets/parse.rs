#![no_main]
#![doc = "See `lb_fuzz::parse`."]

libfuzzer_sys::fuzz_target!(|input: &[u8]| lb_fuzz::parse(input));
