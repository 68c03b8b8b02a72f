//! Plots as SVG, drawn here: axes, lines, stacked areas, bars. They carry their colours for light
//! and dark pages as classes, and say in words what they show.

use std::fmt::Write;

use super::text::{Escaped, compact};

const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 280.0;
const LEFT: f64 = 54.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 44.0;

/// About the width of a character of the labels.
const CHARACTER: f64 = 6.4;

/// Marks that a linear axis has, about.
const TICKS: f64 = 5.0;

/// The colours by class, for light and dark pages. Told apart by people who see few colours, too.
pub(crate) const STYLE: &str = "\
.plot{--ink:#1c2430;--soft:#5b6675;--line:#dfe4ea;--c0:#0b6bcb;--c1:#c2410c;--c2:#0f8a5f;\
--c3:#8b5cf6;--c4:#b58900;--c5:#7c8794;--c6:#d6336c;--ok:#0f8a5f;--bad:#c92a2a;\
font:12px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}\
@media (prefers-color-scheme:dark){.plot{--ink:#e6eaf0;--soft:#97a3b3;--line:#2b3440;--c0:#6cb2ff;\
--c1:#ff9d5c;--c2:#4ad6a0;--c3:#b79cff;--c4:#e6c34a;--c5:#8c97a5;--c6:#ff8ab3;--ok:#4ad6a0;\
--bad:#ff7b7b}}\
.plot text{fill:var(--soft)}.plot .t{fill:var(--ink);font-weight:600}\
.plot .g{stroke:var(--line);stroke-width:1}.plot .a{stroke:var(--soft);stroke-width:1}\
.plot .l{fill:none;stroke-width:1.75;stroke-linejoin:round;stroke-linecap:round}\
.plot .f{fill-opacity:.8;stroke:none}.plot .h{fill:transparent}\
.plot .h:hover{fill:var(--soft);fill-opacity:.16}\
.plot .s0{stroke:var(--c0)}.plot .s1{stroke:var(--c1)}.plot .s2{stroke:var(--c2)}\
.plot .s3{stroke:var(--c3)}.plot .s4{stroke:var(--c4)}.plot .s5{stroke:var(--c5)}\
.plot .s6{stroke:var(--c6)}.plot .s7{stroke:var(--bad)}\
.plot .f0{fill:var(--c0)}.plot .f1{fill:var(--c1)}.plot .f2{fill:var(--c2)}\
.plot .f3{fill:var(--c3)}.plot .f4{fill:var(--c4)}.plot .f5{fill:var(--c5)}\
.plot .f6{fill:var(--c6)}.plot .f7{fill:var(--bad)}";

/// Whether a plot stands in a page, which has the style, or is a file of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a page with [`STYLE`].
    Page,
    /// A file with everything it needs.
    File,
}

/// How values are spread along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scale {
    Linear,
    Log,
}

/// An axis with its marks.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    label: String,
    scale: Scale,
    from: f64,
    to: f64,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From zero, with round marks.
    pub(crate) fn linear(label: &str, most: f64) -> Self {
        let most = if most > 0.0 { most } else { 1.0 };
        let size = 10_f64.powf((most / TICKS).log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|step| step * size)
            .find(|step| most / step <= TICKS)
            .unwrap_or(size * 10.0);
        let to = (most / step - 1e-9).ceil() * step;
        let ticks = (0..=10_u32)
            .map(|n| f64::from(n) * step)
            .take_while(|value| *value <= to * 1.000_001)
            .map(|value| (value, compact(value)))
            .collect();
        Self {
            label: label.to_owned(),
            scale: Scale::Linear,
            from: 0.0,
            to,
            ticks,
        }
    }

    /// From zero to an end that is no mark.
    pub(crate) fn until(self, to: f64) -> Self {
        let ticks = self.ticks.into_iter().filter(|(value, _)| *value <= to);
        Self {
            to: if to > 0.0 { to } else { self.to },
            ticks: ticks.collect(),
            ..self
        }
    }

    /// In powers of ten, with marks at 1, 2 and 5 if there is room.
    pub(crate) fn log(label: &str, least: f64, most: f64) -> Self {
        let least = least.max(1e-3);
        let most = most.max(least * 10.0);
        let (from, to) = (least.log10().floor(), most.log10().ceil());
        let steps: &[f64] = if to - from <= 2.0 {
            &[1.0, 2.0, 5.0]
        } else {
            &[1.0]
        };
        let mut ticks = Vec::new();
        let mut power = from;
        while power <= to + 0.5 {
            for step in steps {
                let value = step * 10_f64.powf(power);
                if value <= 10_f64.powf(to) * 1.000_001 {
                    ticks.push((value, compact(value)));
                }
            }
            power += 1.0;
        }
        Self {
            label: label.to_owned(),
            scale: Scale::Log,
            from: 10_f64.powf(from),
            to: 10_f64.powf(to),
            ticks,
        }
    }

    /// Quantiles, each nine as wide as the one before.
    pub(crate) fn quantiles(highest: f64) -> Self {
        let to = tail(highest).max(2.0);
        let ticks = [
            (0.5, "50 %"),
            (0.9, "90 %"),
            (0.99, "99 %"),
            (0.999, "99.9 %"),
            (0.9999, "99.99 %"),
            (0.99999, "99.999 %"),
        ];
        Self {
            label: "purchases that were faster".to_owned(),
            scale: Scale::Linear,
            from: 0.0,
            to,
            ticks: ticks
                .into_iter()
                .map(|(quantile, text)| (tail(quantile), text.to_owned()))
                .filter(|(place, _)| *place <= to)
                .collect(),
        }
    }

    /// Where a value lies, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let share = match self.scale {
            Scale::Linear => (value - self.from) / (self.to - self.from),
            Scale::Log => {
                (value.max(self.from) / self.from).log10() / (self.to / self.from).log10()
            }
        };
        share.clamp(0.0, 1.0)
    }
}

/// The place of a quantile on [`Axis::quantiles`]: log₁₀ of 1 ÷ (1 − q).
pub(crate) fn tail(quantile: f64) -> f64 {
    -(1.0 - quantile).max(1e-7).log10()
}

/// Something drawn, with its colour.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) label: String,
    /// 0 to 7.
    pub(crate) colour: usize,
    pub(crate) shape: Shape,
}

#[derive(Clone, Debug)]
pub(crate) enum Shape {
    /// Interrupted where there is no value.
    Line(Vec<(f64, Option<f64>)>),
    /// Between a lower and an upper edge.
    Area(Vec<(f64, f64, f64)>),
}

/// A plot.
#[derive(Clone, Debug)]
pub(crate) struct Plot {
    pub(crate) title: String,
    /// What it shows, in words.
    pub(crate) summary: String,
    pub(crate) x: Axis,
    pub(crate) y: Axis,
    pub(crate) layers: Vec<Layer>,
    /// What a pointer is told between two values of x.
    pub(crate) hints: Vec<(f64, f64, String)>,
}

impl Plot {
    /// The whole plot.
    pub(crate) fn svg(&self, place: Place) -> String {
        let mut svg = open(&self.title, &self.summary, HEIGHT, place);
        let (x_of, y_of) = (
            |value| LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT),
            |value| HEIGHT - BOTTOM - self.y.place(value) * (HEIGHT - TOP - BOTTOM),
        );
        let floor = HEIGHT - BOTTOM;
        for (value, text) in &self.y.ticks {
            let y = y_of(*value);
            put(
                &mut svg,
                format_args!(
                    "<path class=\"g\" d=\"M{LEFT:.1} {y:.1}H{:.1}\"/>\
                     <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                    WIDTH - RIGHT,
                    LEFT - 6.0,
                    y + 4.0,
                    Escaped(text),
                ),
            );
        }
        for layer in &self.layers {
            layer.draw(&mut svg, &x_of, &y_of);
        }
        put(
            &mut svg,
            format_args!(
                "<path class=\"a\" d=\"M{LEFT:.1} {floor:.1}H{:.1}\"/>",
                WIDTH - RIGHT
            ),
        );
        let mut free_from = 0.0;
        for (value, text) in &self.x.ticks {
            let x = x_of(*value);
            #[expect(clippy::cast_precision_loss, reason = "labels are short")]
            let half = text.chars().count() as f64 * CHARACTER / 2.0;
            if x - half < free_from || x + half > WIDTH {
                continue;
            }
            free_from = x + half + CHARACTER;
            put(
                &mut svg,
                format_args!(
                    "<path class=\"a\" d=\"M{x:.1} {floor:.1}v4\"/>\
                     <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                    floor + 17.0,
                    Escaped(text),
                ),
            );
        }
        put(
            &mut svg,
            format_args!(
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
                 <text x=\"0\" y=\"11\">{}</text>",
                WIDTH - RIGHT,
                HEIGHT - 8.0,
                Escaped(&self.x.label),
                Escaped(&self.y.label),
            ),
        );
        self.legend(&mut svg);
        for (from, to, text) in &self.hints {
            let (from, to) = (x_of(*from), x_of(*to));
            put(
                &mut svg,
                format_args!(
                    "<rect class=\"h\" x=\"{from:.1}\" y=\"{TOP:.1}\" width=\"{:.1}\" \
                     height=\"{:.1}\"><title>{}</title></rect>",
                    (to - from).max(0.5),
                    floor - TOP,
                    Escaped(text),
                ),
            );
        }
        svg.push_str("</svg>");
        svg
    }

    /// Who is which colour, above the plot, from the right.
    fn legend(&self, svg: &mut String) {
        let labels: Vec<(&str, usize)> = self
            .layers
            .iter()
            .map(|layer| (layer.label.as_str(), layer.colour))
            .collect();
        legend(svg, &labels, 11.0);
    }
}

impl Layer {
    fn draw(&self, svg: &mut String, x_of: &dyn Fn(f64) -> f64, y_of: &dyn Fn(f64) -> f64) {
        let colour = self.colour;
        match &self.shape {
            Shape::Line(points) => {
                let mut path = String::new();
                let mut is_drawing = false;
                for (n, (x, y)) in points.iter().enumerate() {
                    let Some(y) = y else {
                        is_drawing = false;
                        continue;
                    };
                    let is_last = points.get(n + 1).is_none_or(|(_, next)| next.is_none());
                    let step = if is_drawing { 'L' } else { 'M' };
                    put(
                        &mut path,
                        format_args!("{step}{:.1} {:.1}", x_of(*x), y_of(*y)),
                    );
                    if is_last && !is_drawing {
                        // A single value is a dot.
                        path.push_str("h.1");
                    }
                    is_drawing = true;
                }
                put(
                    svg,
                    format_args!("<path class=\"l s{colour}\" d=\"{path}\"/>"),
                );
            }
            Shape::Area(edges) => {
                let mut path = String::new();
                for (n, (x, _, upper)) in edges.iter().enumerate() {
                    let step = if n == 0 { 'M' } else { 'L' };
                    put(
                        &mut path,
                        format_args!("{step}{:.1} {:.1}", x_of(*x), y_of(*upper)),
                    );
                }
                for (x, lower, _) in edges.iter().rev() {
                    put(
                        &mut path,
                        format_args!("L{:.1} {:.1}", x_of(*x), y_of(*lower)),
                    );
                }
                put(
                    svg,
                    format_args!("<path class=\"f f{colour}\" d=\"{path}Z\"/>"),
                );
            }
        }
    }
}

/// Horizontal bars, each of several parts.
#[derive(Clone, Debug)]
pub(crate) struct Bars {
    pub(crate) title: String,
    /// What they show, in words.
    pub(crate) summary: String,
    pub(crate) unit: String,
    /// What each part is, in the order of the colours.
    pub(crate) parts: Vec<String>,
    pub(crate) rows: Vec<(String, Vec<f64>)>,
}

impl Bars {
    /// The whole plot.
    pub(crate) fn svg(&self, place: Place) -> String {
        const ROW: f64 = 44.0;
        #[expect(clippy::cast_precision_loss, reason = "rows are few")]
        let height = TOP + self.rows.len() as f64 * ROW;
        let mut svg = open(&self.title, &self.summary, height, place);
        let labels: Vec<(&str, usize)> = self
            .parts
            .iter()
            .enumerate()
            .map(|(n, part)| (part.as_str(), n % 7))
            .collect();
        legend(&mut svg, &labels, 11.0);
        let sum = |parts: &[f64]| parts.iter().sum::<f64>();
        let most = self.rows.iter().map(|(_, parts)| sum(parts));
        let most = most.fold(f64::MIN_POSITIVE, f64::max);
        let mut y = TOP;
        for (label, parts) in &self.rows {
            put(
                &mut svg,
                format_args!(
                    "<text class=\"t\" x=\"0\" y=\"{:.1}\">{}</text>\
                     <text x=\"{WIDTH:.1}\" y=\"{:.1}\" text-anchor=\"end\">{} {}</text>",
                    y + 11.0,
                    Escaped(label),
                    y + 11.0,
                    compact(sum(parts)),
                    Escaped(&self.unit),
                ),
            );
            let mut x = 0.0;
            for (n, part) in parts.iter().enumerate() {
                let width = part / most * WIDTH;
                put(
                    &mut svg,
                    format_args!(
                        "<rect class=\"f f{}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" \
                         height=\"16\"><title>{}: {} {}</title></rect>",
                        n % 7,
                        y + 17.0,
                        Escaped(self.parts.get(n).map_or("", String::as_str)),
                        compact(*part),
                        Escaped(&self.unit),
                    ),
                );
                x += width;
            }
            y += ROW;
        }
        svg.push_str("</svg>");
        svg
    }
}

/// The beginning of a plot: its size, its name, what it shows.
fn open(title: &str, summary: &str, height: f64, place: Place) -> String {
    let mut svg = String::from("<svg class=\"plot\" role=\"img\"");
    if place == Place::File {
        // Only a file of its own needs to say what language it is in.
        svg.push_str(" xmlns=\"http://www.w3.org/2000/svg\"");
    }
    put(
        &mut svg,
        format_args!(
            " viewBox=\"0 0 {WIDTH:.0} {height:.0}\"><title>{}</title><desc>{}</desc>",
            Escaped(title),
            Escaped(summary)
        ),
    );
    if place == Place::File {
        put(&mut svg, format_args!("<style>{STYLE}</style>"));
    }
    svg
}

/// Who is which colour, from the right.
fn legend(svg: &mut String, labels: &[(&str, usize)], y: f64) {
    if labels.len() < 2 {
        return;
    }
    let mut x = WIDTH - RIGHT;
    for (label, colour) in labels.iter().rev() {
        #[expect(clippy::cast_precision_loss, reason = "labels are short")]
        let width = label.chars().count() as f64 * CHARACTER;
        put(
            svg,
            format_args!(
                "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>\
                 <rect class=\"f f{colour}\" x=\"{:.1}\" y=\"{:.1}\" width=\"9\" height=\"9\" \
                 rx=\"2\"/>",
                Escaped(label),
                x - width - 17.0,
                y - 9.0,
            ),
        );
        x -= width + 30.0;
    }
}

/// Appends; writing to a string cannot fail.
pub(crate) fn put(text: &mut String, what: std::fmt::Arguments<'_>) {
    let _ = text.write_fmt(what);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_axis_has_round_marks_up_to_the_most() {
        for (most, wanted) in [
            (1.0, &["0", "0.2", "0.4", "0.6", "0.8", "1"][..]),
            (4321.0, &["0", "1k", "2k", "3k", "4k", "5k"]),
            (0.0, &["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ] {
            let axis = Axis::linear("", most);
            let texts: Vec<&str> = axis.ticks.iter().map(|(_, text)| text.as_str()).collect();
            assert_eq!(texts, wanted, "{most}");
            assert!(axis.to >= most);
        }
    }

    #[test]
    fn a_log_axis_spreads_powers_of_ten_evenly() {
        let axis = Axis::log("", 0.4, 900.0);
        let places: Vec<f64> = [0.1, 1.0, 10.0, 100.0, 1000.0]
            .map(|v| axis.place(v))
            .to_vec();
        for (n, place) in (0_u32..).zip(&places) {
            assert!((place - f64::from(n) / 4.0).abs() < 1e-9, "{places:?}");
        }
        assert_eq!(axis.ticks.len(), 5);
    }

    #[test]
    fn each_nine_is_as_wide_as_the_one_before() {
        let axis = Axis::quantiles(0.9999);
        let width = axis.place(tail(0.99)) - axis.place(tail(0.9));
        assert!((width - 0.25).abs() < 1e-6);
        assert_eq!(axis.ticks.last().unwrap().1, "99.99 %");
    }

    #[test]
    fn a_plot_breaks_lines_where_nothing_was_measured_and_escapes_names() {
        let plot = Plot {
            title: "<b>".to_owned(),
            summary: "\"&".to_owned(),
            x: Axis::linear("s", 4.0),
            y: Axis::linear("ms", 10.0),
            layers: vec![Layer {
                label: "p<50".to_owned(),
                colour: 0,
                shape: Shape::Line(vec![
                    (0.0, Some(1.0)),
                    (1.0, Some(2.0)),
                    (2.0, None),
                    (3.0, Some(3.0)),
                ]),
            }],
            hints: vec![(0.0, 1.0, "<i>".to_owned())],
        };
        let svg = plot.svg(Place::File);
        assert!(
            svg.contains("<title>&lt;b&gt;</title><desc>&quot;&amp;</desc>"),
            "{svg}"
        );
        let path = svg.split("class=\"l s0\" d=\"").nth(1).unwrap();
        let path = path.split('"').next().unwrap();
        assert_eq!(path.matches('M').count(), 2, "{path}");
        assert!(path.ends_with("h.1"), "{path}");
        assert!(!plot.svg(Place::Page).contains("http"));
    }
}
