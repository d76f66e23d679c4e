//! The figures as a picture: small panels with both axes logarithmic, as SVG.

use std::fmt::Write as _;

use super::{Figures, Scenario};

/// A panel: its title, the unit of its vertical axis, and the value of a run.
type Panel = (&'static str, &'static str, fn(&Figures) -> f64);

const PANELS: &[Panel] = &[
    ("Lookup requests for a 1 GiB VM", "requests", |f| f.requests),
    ("Index bytes of a VM's lookup", "bytes", |f| f.index_bytes),
    ("Until the last page has come", "ms", |f| f.answer_ms),
    ("Pages missed of those held", "%", |f| 100.0 - f.hit_percent),
    ("Index bytes a host (mean)", "bytes", |f| f.index_bytes_per_host),
    ("Index bytes of the worst host", "bytes", |f| f.index_bytes_worst_host),
    ("Announced by a host", "bytes/s", |f| f.announce_bytes_per_s),
    ("Announcements heard by an owner", "messages/s", |f| f.heard_per_s),
    ("Re-homed, a host", "bytes/min", |f| f.rehomed_bytes_per_min),
];

const COLOURS: [&str; 5] = ["#1b6ca8", "#d1495b", "#3a7d44", "#b8860b", "#6a4c93"];
const COLUMNS: usize = 3;
/// A panel with its titles, in pixels.
const WIDTH: f64 = 330.0;
const HEIGHT: f64 = 230.0;
/// Room within it for titles and numbers.
const LEFT: f64 = 58.0;
const TOP: f64 = 44.0;
const RIGHT: f64 = 16.0;
const BOTTOM: f64 = 34.0;
/// Room above all panels for the key.
const KEY: f64 = 40.0;

/// Draws all panels.
#[must_use]
pub fn svg(all: &[Figures]) -> String {
    let rows = PANELS.len().div_ceil(COLUMNS) as f64;
    let (width, height) = (WIDTH * COLUMNS as f64, HEIGHT * rows + KEY);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for (n, (scenario, colour)) in Scenario::ALL.iter().zip(COLOURS).enumerate() {
        let x = LEFT + 130.0 * n as f64;
        push(
            &mut out,
            format_args!("<rect x=\"{x}\" y=\"14\" width=\"14\" height=\"4\" fill=\"{colour}\"/>"),
        );
        text(&mut out, (x + 20.0, 20.0), "start", scenario.name());
    }
    for (n, panel) in PANELS.iter().enumerate() {
        let corner = (WIDTH * (n % COLUMNS) as f64, KEY + HEIGHT * (n / COLUMNS) as f64);
        draw(&mut out, panel, corner, all);
    }
    out + "</svg>\n"
}

fn push(out: &mut String, element: std::fmt::Arguments<'_>) {
    writeln!(out, "{element}").expect("a String takes all");
}

fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, words: &str) {
    push(out, format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>"));
}

/// One logarithmic axis: powers of ten from `low` to `high`, on `from` to `to` pixels.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// The powers of ten around the values.
    fn around(values: impl Iterator<Item = f64> + Clone, from: f64, to: f64) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min).log10().floor();
        let high = values.fold(0.0, f64::max).log10().ceil();
        Self { low, high: high.max(low + 1.0), from, to }
    }

    fn place(&self, value: f64) -> f64 {
        self.from + (value.log10() - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// The powers of ten on it.
    fn ticks(&self) -> impl Iterator<Item = f64> {
        let (low, high) = (self.low, self.high);
        (0u32..)
            .map(move |n| low + f64::from(n))
            .take_while(move |power| *power <= high)
            .map(|power| 10f64.powf(power))
    }
}

fn draw(out: &mut String, (title, unit, value): &Panel, (left, top): (f64, f64), all: &[Figures]) {
    text(out, (left + LEFT, top + 16.0), "start", title);
    text(out, (left + LEFT, top + 32.0), "start", unit);
    // Nothing is at 0 on a logarithmic axis: such points are left out.
    let shown = || all.iter().filter(|figures| value(figures) > 0.0);
    if shown().next().is_none() {
        text(out, (left + LEFT + 40.0, top + 100.0), "start", "0 everywhere");
        return;
    }
    let x = Axis::around(shown().map(|f| f.peers as f64), left + LEFT, left + WIDTH - RIGHT);
    let y = Axis::around(shown().map(*value), top + HEIGHT - BOTTOM, top + TOP);
    for tick in x.ticks() {
        let at = x.place(tick);
        let (from, to) = (y.from, y.to);
        push(out, format_args!("<path d=\"M{at:.1} {from:.1}V{to:.1}\" stroke=\"#ddd\"/>"));
        text(out, (at, from + 14.0), "middle", &number(tick));
    }
    for tick in y.ticks() {
        let at = y.place(tick);
        let (from, to) = (x.from, x.to);
        push(out, format_args!("<path d=\"M{from:.1} {at:.1}H{to:.1}\" stroke=\"#ddd\"/>"));
        text(out, (from - 5.0, at + 4.0), "end", &number(tick));
    }
    for (scenario, colour) in Scenario::ALL.iter().zip(COLOURS) {
        let points: Vec<(f64, f64)> = shown()
            .filter(|figures| figures.scenario == *scenario)
            .map(|figures| (x.place(figures.peers as f64), y.place(value(figures))))
            .collect();
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let path = path.join(" ");
        push(
            out,
            format_args!(
                "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>"
            ),
        );
        for (x, y) in points {
            push(out, format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" fill=\"{colour}\"/>"));
        }
    }
}

/// A power of ten in few letters.
fn number(value: f64) -> String {
    match value {
        value if value >= 1e9 => format!("{:.0}G", value / 1e9),
        value if value >= 1e6 => format!("{:.0}M", value / 1e6),
        value if value >= 1e3 => format!("{:.0}k", value / 1e3),
        value if value >= 1.0 => format!("{value:.0}"),
        value => format!("{value:.4}").trim_end_matches('0').to_owned(),
    }
}
