//! Numbers as people read them.

/// Milliseconds since 1970-01-01 UTC. The engine never reads a clock: times are handed to it.
pub type UnixMs = u64;

/// The machine's clock.
pub fn unix_ms_now() -> UnixMs {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}

/// A byte count with a decimal unit: "1.5 MB".
pub fn bytes(count: u64) -> String {
    scaled(count, &[(1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB")], " B")
}

/// A count with a decimal suffix: "12.3M".
pub fn count(count: u64) -> String {
    scaled(count, &[(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")], "")
}

fn scaled(count: u64, units: &[(f64, &str)], base: &str) -> String {
    #[allow(clippy::cast_precision_loss)]
    let value = count as f64;
    for (scale, unit) in units {
        if value >= *scale {
            let scaled = value / scale;
            let digits = if scaled < 10.0 { 2 } else { usize::from(scaled < 100.0) };
            return format!("{scaled:.digits$}{unit}");
        }
    }
    format!("{count}{base}")
}

/// A duration as "850 ms", "12.3 s", "4 min 05 s" or "3 h 07 min".
pub fn duration_ms(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    match seconds {
        0 => format!("{milliseconds} ms"),
        1..60 => format!("{}.{} s", seconds, milliseconds % 1000 / 100),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        for (value, expected) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_500, "1.50 kB"),
            (12_345_678, "12.3 MB"),
            (4_000_000_000, "4.00 GB"),
        ] {
            assert_eq!(bytes(value), expected);
        }
        assert_eq!(count(1_048_576), "1.05M");
        for (value, expected) in
            [(850, "850 ms"), (12_345, "12.3 s"), (245_000, "4 min 05 s"), (11_220_000, "3 h 07 min")]
        {
            assert_eq!(duration_ms(value), expected);
        }
    }
}
