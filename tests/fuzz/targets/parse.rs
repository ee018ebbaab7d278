#![no_main]
#![doc = "See `lb_packet_checks::parse`."]

libfuzzer_sys::fuzz_target!(|input: &[u8]| lb_packet_checks::parse(input));
