//! The protocol's values as people read them. Pure.

use consort_common::{ids::Digest, units};
use consort_proto::v1::{ClientActivity, ClientSummary, Participation, Phase, Progress, RunStatus};
use jiff::{Timestamp, tz::TimeZone};

/// What stands where there is no value.
pub const NONE: &str = "-";

/// A run's status in one word; the same words in JSON.
pub fn run_status(status: RunStatus) -> &'static str {
    match status {
        RunStatus::Unspecified => "unknown",
        RunStatus::Created => "created",
        RunStatus::Active => "active",
        RunStatus::Paused => "paused",
        RunStatus::Finished => "finished",
        RunStatus::Aborted => "aborted",
    }
}

/// A round's phase in one word; the same words in JSON.
pub fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Unspecified => "unknown",
        Phase::Waiting => "waiting",
        Phase::Training => "training",
        Phase::Reducing => "reducing",
        Phase::Evaluating => "evaluating",
        Phase::Done => "done",
    }
}

/// What a client does, in one word; the same words in JSON.
pub fn activity(activity: ClientActivity) -> &'static str {
    match activity {
        ClientActivity::Unspecified => "unknown",
        ClientActivity::Idle => "idle",
        ClientActivity::Preparing => "preparing",
        ClientActivity::Downloading => "downloading",
        ClientActivity::Evaluating => "evaluating",
        ClientActivity::Training => "training",
        ClientActivity::Uploading => "uploading",
    }
}

/// What a client was asked to do in the round; JSON has these words with `_`.
pub fn participation(participation: Participation) -> &'static str {
    match participation {
        Participation::Unspecified => "unknown",
        Participation::NotSelected => "not selected",
        Participation::Working => "working",
        Participation::Delivered => "delivered",
        Participation::Replaced => "replaced",
        Participation::Behind => "behind",
    }
}

/// How a client is, in a word: what it does where it does something, else its part in the round.
pub fn client_state(client: &ClientSummary) -> &'static str {
    if !client.connected {
        return "offline";
    }
    let participation = client.participation();
    let doing = client.progress.as_ref().map(Progress::activity).filter(|activity| match activity {
        ClientActivity::Unspecified | ClientActivity::Idle => false,
        // The last report of work that is over: only who is working trains or sends.
        ClientActivity::Training | ClientActivity::Uploading => {
            matches!(participation, Participation::Working | Participation::Behind)
        }
        ClientActivity::Preparing | ClientActivity::Downloading | ClientActivity::Evaluating => true,
    });
    match (participation, doing) {
        (Participation::Replaced, _) => "replaced",
        (_, Some(doing)) => activity(doing),
        (Participation::Delivered, None) => "delivered",
        (Participation::Working | Participation::Behind, None) => "starting",
        (Participation::NotSelected | Participation::Unspecified, None) => "idle",
    }
}

/// A loss in nats per token.
pub fn loss(loss: f64) -> String {
    if loss.abs() < 1000.0 || !loss.is_finite() { format!("{loss:.3}") } else { format!("{loss:.1e}") }
}

/// The perplexity of a loss in nats per token: its exponential.
pub fn perplexity(loss: f64) -> String {
    match loss.exp() {
        value if !value.is_finite() => value.to_string(),
        value if value < 10.0 => format!("{value:.3}"),
        value if value < 100.0 => format!("{value:.2}"),
        value if value < 1e6 => format!("{value:.0}"),
        value => format!("{value:.1e}"),
    }
}

/// A norm, or another number of no known size.
pub fn number(number: f64) -> String {
    if number != 0.0 && number.is_finite() && !(1e-3..1e6).contains(&number.abs()) {
        return format!("{number:.3e}");
    }
    format!("{number:.4}")
}

/// A count with a decimal suffix; "-" for none.
pub fn count_or_none(count: u64) -> String {
    if count == 0 { NONE.to_owned() } else { units::count(count) }
}

/// A digest's hexadecimal digits; "-" for none.
pub fn digest(bytes: &[u8]) -> String {
    Digest::try_from(bytes).map_or_else(|_| NONE.to_owned(), |digest| digest.to_string())
}

/// A digest's first digits; "-" for none.
pub fn short_digest(bytes: &[u8]) -> String {
    Digest::try_from(bytes).map_or_else(|_| NONE.to_owned(), |digest| digest.short())
}

/// A moment with its date; "-" for none.
pub fn date(unix_ms: u64, zone: &TimeZone) -> String {
    moment(unix_ms, zone, "%Y-%m-%d %H:%M:%S")
}

/// A moment of today; "-" for none.
pub fn clock(unix_ms: u64, zone: &TimeZone) -> String {
    moment(unix_ms, zone, "%H:%M:%S")
}

fn moment(unix_ms: u64, zone: &TimeZone, format: &str) -> String {
    let timestamp = i64::try_from(unix_ms).ok().filter(|unix_ms| *unix_ms > 0);
    timestamp.and_then(|unix_ms| Timestamp::from_millisecond(unix_ms).ok()).map_or_else(
        || NONE.to_owned(),
        |timestamp| timestamp.to_zoned(zone.clone()).strftime(format).to_string(),
    )
}

/// How long ago a moment was; "-" for none.
pub fn ago(unix_ms: u64, now_unix_ms: u64) -> String {
    match unix_ms {
        0 => NONE.to_owned(),
        // A second's difference between two machines' clocks is nothing to speak of.
        then if now_unix_ms.saturating_sub(then) < 2_000 => "just now".to_owned(),
        then => format!("{} ago", units::duration_ms(now_unix_ms.saturating_sub(then))),
    }
}

/// "1 site", "3 sites".
pub fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_to_eight_columns() {
        for value in [0.0, 0.5, 5.549, 12.0, 700.0, 1e9, -1e300, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for text in [loss(value), perplexity(value)] {
                assert!(text.len() <= 8, "{value} gives {text}");
            }
        }
        assert_eq!(perplexity(5.549), "257");
        assert_eq!(perplexity(1.0), "2.718");
        assert_eq!(perplexity(1000.0), "inf");
        assert_eq!(number(0.000_012), "1.200e-5");
        assert_eq!(number(0.25), "0.2500");
    }

    #[test]
    fn moments_are_of_their_zone_and_zero_is_none() {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        assert_eq!(date(1_700_000_000_000, &zone), "2023-11-15 00:13:20");
        assert_eq!(clock(1_700_000_000_000, &TimeZone::UTC), "22:13:20");
        assert_eq!(date(0, &zone), "-");
        assert_eq!(date(u64::MAX, &zone), "-");
        assert_eq!(ago(1_000, 61_000), "1 min 00 s ago");
        assert_eq!(ago(5_000, 1_000), "just now");
    }

    #[test]
    fn a_client_is_what_it_does_until_it_has_delivered() {
        let client = |connected, participation: Participation, activity: ClientActivity| ClientSummary {
            connected,
            participation: participation.into(),
            progress: Some(Progress { activity: activity.into(), ..Progress::default() }),
            ready: true,
            ..ClientSummary::default()
        };
        for (state, expected) in [
            (client(false, Participation::Working, ClientActivity::Training), "offline"),
            (client(true, Participation::Working, ClientActivity::Training), "training"),
            (client(true, Participation::Working, ClientActivity::Idle), "starting"),
            (client(true, Participation::Delivered, ClientActivity::Uploading), "delivered"),
            (client(true, Participation::Delivered, ClientActivity::Evaluating), "evaluating"),
            (client(true, Participation::NotSelected, ClientActivity::Idle), "idle"),
            (client(true, Participation::NotSelected, ClientActivity::Training), "idle"),
            (client(true, Participation::Replaced, ClientActivity::Training), "replaced"),
            (client(true, Participation::Unspecified, ClientActivity::Preparing), "preparing"),
        ] {
            assert_eq!(client_state(&state), expected);
        }
    }

    #[test]
    fn digests_are_shown_whole_or_in_twelve_digits() {
        assert_eq!(digest(&[0xAB; 32]), "ab".repeat(32));
        assert_eq!(short_digest(&[0xAB; 32]), "ab".repeat(6));
        assert_eq!(digest(&[]), "-");
    }
}
