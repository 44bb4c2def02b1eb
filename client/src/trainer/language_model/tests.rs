//! Models that are asked, through their outer interface and, for attention, through the forward pass.

use std::ops::ControlFlow;

use consort_common::{
    model::{Gpt2Config, LlamaConfig, MptAttentionConfig, MptConfig, RopeScaling},
    spec::TrainingSpec,
};

use super::{super::tests::*, *};
use crate::trainer::{EvaluationSum, Sampling, attention::Cache, test_device};

/// All architectures with room for more positions, features that the smallest leave out, and weights large
/// enough for attention to matter to the logits.
fn rich() -> [Architecture; 3] {
    let (initializer_range, context) = (0.3, 150);
    [
        Architecture::Llama(LlamaConfig {
            initializer_range,
            max_position_embeddings: context,
            head_dim: Some(10),
            attention_bias: true,
            mlp_bias: true,
            rope_scaling: Some(RopeScaling {
                factor: 4.0,
                original_max_position_embeddings: 40,
                ..RopeScaling::default()
            }),
            ..llama_config()
        }),
        Architecture::Gpt2(Gpt2Config {
            initializer_range,
            vocab_size: VOCABULARY,
            n_positions: context,
            n_embd: 32,
            n_layer: 2,
            n_head: 4,
            n_inner: Some(40),
            tie_word_embeddings: false,
            ..Gpt2Config::default()
        }),
        Architecture::Mpt(MptConfig {
            initializer_range,
            vocab_size: VOCABULARY,
            max_seq_len: context,
            d_model: 36,
            n_layers: 2,
            n_heads: 3,
            attn_config: MptAttentionConfig { clip_qkv: Some(1.5), softmax_scale: Some(0.2) },
            ..MptConfig::default()
        }),
    ]
}

/// Tokens without an end of text, different for each `seed`.
fn text(seed: i64, length: usize) -> Vec<i64> {
    (0..length as i64)
        .map(|index| (index * index * 7 + index * 3 + seed * 11) % i64::from(END_OF_TEXT))
        .collect()
}

/// The logits of `tokens` where attention is kept within documents.
fn logits_within_documents(model: &LanguageModel, tokens: &[i64]) -> Vec<f32> {
    let tokens = upload(tokens, &[1, tokens.len() as i64], model.device).unwrap();
    let mut attention = Attention::within_documents(&tokens, END_OF_TEXT.into()).unwrap();
    let hidden = model.model.hidden(&tokens, &mut attention).unwrap();
    let logits = hidden.linear(model.model.output(), None::<&Tensor>);
    model.read_logits(&logits, tokens.numel()).unwrap()
}

#[test]
fn grouped_query_attention_is_that_of_repeated_key_and_value_heads() {
    let grouped = llama();
    let full = Architecture::Llama(LlamaConfig { num_key_value_heads: 4, ..llama_config() });
    let flat = grouped.manifest().initialise(7);
    let head = 8 * 32; // values of one head's projection
    let repeated: Vec<f32> = full
        .manifest()
        .tensors()
        .iter()
        .flat_map(|spec| {
            let values = tensor(&grouped, &flat, &spec.name);
            if spec.name.contains("k_proj") || spec.name.contains("v_proj") {
                values.chunks(head).flat_map(|head| [head, head].concat()).collect()
            } else {
                values.to_vec()
            }
        })
        .collect();
    let full = LanguageModel::from_flat(&full, &repeated, test_device()).unwrap();
    let tokens = &batch(3)[..12];
    let difference =
        largest_difference(&model(&grouped).logits(tokens).unwrap(), &full.logits(tokens).unwrap());
    assert!(difference < 1e-6, "{difference:e}");
}

#[test]
fn a_tied_head_is_the_embedding() {
    let (tied, untied) =
        (llama(), Architecture::Llama(LlamaConfig { tie_word_embeddings: false, ..llama_config() }));
    let mut flat = tied.manifest().initialise(7);
    let tied = model(&tied);
    flat.extend_from_within(..VOCABULARY * 32);
    let untied = LanguageModel::from_flat(&untied, &flat, test_device()).unwrap();
    assert_eq!(tied.logits(&batch(1)[..9]).unwrap(), untied.logits(&batch(1)[..9]).unwrap());
}

#[test]
fn later_tokens_do_not_change_earlier_logits() {
    for architecture in all() {
        let model = model(&architecture);
        let mut tokens = batch(1)[..16].to_vec();
        let before = model.logits(&tokens).unwrap();
        tokens[10] = (tokens[10] + 1) % VOCABULARY as i64;
        let after = model.logits(&tokens).unwrap();
        let (earlier, later) = (10 * VOCABULARY, 11 * VOCABULARY);
        assert!(largest_difference(&before[..earlier], &after[..earlier]) < 1e-7);
        assert!(largest_difference(&before[earlier..later], &after[earlier..later]) > 1e-4);
        assert!(largest_difference(&before[later..], &after[later..]) > 1e-6, "later ones see it");
    }
}

#[test]
fn order_matters_to_attention() {
    for architecture in all() {
        let model = model(&architecture);
        let last = |tokens: &[i64]| model.logits(tokens).unwrap().split_off(3 * VOCABULARY);
        assert!(
            largest_difference(&last(&[1, 2, 3, 4]), &last(&[2, 1, 3, 4])) > 1e-5,
            "{}",
            architecture.name()
        );
    }
}

#[test]
fn held_out_loss_is_the_sum_over_windows_of_any_length() {
    for architecture in all() {
        let model = model(&architecture);
        let windows: Vec<Vec<i64>> =
            [9, 9, 9, 9, 9, 9, 4, 17, 2].map(|length| batch(length)[..length as usize].to_vec()).to_vec();
        let all = model.evaluate(windows.clone(), 4, &go_on).unwrap();
        assert_eq!(all.tokens, 6 * 8 + 3 + 16 + 1);
        let mut one_by_one = EvaluationSum::default();
        for window in windows {
            // Cross-entropy by hand from the logits.
            let logits = model.logits(&window[..window.len() - 1]).unwrap();
            for (row, target) in logits.chunks(VOCABULARY).zip(&window[1..]) {
                let total: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
                one_by_one.loss_sum += total.ln() - f64::from(row[*target as usize]);
                one_by_one.tokens += 1;
            }
        }
        assert_eq!(all.tokens, one_by_one.tokens);
        assert!((all.loss_sum / one_by_one.loss_sum - 1.0).abs() < 1e-5, "{all:?} {one_by_one:?}");
        assert!((all.perplexity() / VOCABULARY as f64 - 1.0).abs() < 0.05);
    }
}

#[test]
fn evaluation_can_be_cancelled_and_of_nothing_is_nothing() {
    let model = model(&llama());
    let windows = vec![batch(1)[..9].to_vec()];
    assert!(matches!(model.evaluate(windows, 4, &|| true), Err(TrainerError::Cancelled)));
    assert_eq!(model.evaluate([], 4, &go_on).unwrap(), EvaluationSum::default());
}

#[test]
fn generated_text_follows_its_seed_and_outgrows_the_context() {
    let model = model(&llama());
    let text = |seed, temperature| {
        let mut text = Vec::new();
        let sampling = Sampling { temperature, top_p: 0.9, seed };
        let keep = |token| {
            text.push(token);
            ControlFlow::Continue(())
        };
        model.generate(&[1, 2, 3], 30, sampling, keep).unwrap();
        text
    };
    assert_eq!(text(1, 1.0).len(), 30);
    assert_eq!(text(1, 1.0), text(1, 1.0));
    assert_ne!(text(1, 1.0), text(2, 1.0));
    assert_eq!(text(1, 0.0), text(2, 0.0), "no draw at temperature 0");
}

#[test]
fn generation_ends_when_told() {
    let mut count = 0;
    let stop = |_| {
        count += 1;
        if count == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let sampling = Sampling { temperature: 1.0, top_p: 1.0, seed: 1 };
    model(&gpt2()).generate(&[1], 30, sampling, stop).unwrap();
    assert_eq!(count, 3);
}

#[test]
fn logits_with_kept_keys_and_values_are_those_of_the_whole_text() {
    for architecture in rich() {
        let model = model(&architecture);
        let tokens = text(1, 150);
        let whole = model.logits(&tokens).unwrap();
        let mut cache = Cache::default();
        let mut done = 0;
        // A prompt, a longer piece behind it for which the room does not suffice, then one by one.
        for new in [40, 50].into_iter().chain([1; 60]) {
            let logits = model.next_logits(&tokens[done..done + new], &mut cache).unwrap();
            done += new;
            let expected = &whole[(done - 1) * VOCABULARY..done * VOCABULARY];
            let difference = largest_difference(&logits, expected);
            assert!(difference < 2e-5, "{} at {done}: {difference:e}", architecture.name());
        }
        assert_eq!(cache.length(), 150);
    }
}

#[test]
fn when_the_context_is_full_the_latter_half_of_it_is_read_anew() {
    for architecture in all() {
        let model = model(&architecture);
        let prompt = text(3, 5);
        let mut expected = prompt.clone();
        let mut begin = 0;
        for _ in 0..40 {
            if expected.len() - begin > 16 {
                begin = expected.len() - 8;
            }
            let logits = model.logits(&expected[begin..]).unwrap();
            let last = &logits[logits.len() - VOCABULARY..];
            let likeliest = (0..VOCABULARY).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
            expected.push(likeliest as i64);
        }
        let mut generated = prompt.clone();
        let keep = |token| {
            generated.push(token);
            ControlFlow::Continue(())
        };
        model.generate(&prompt, 40, Sampling { temperature: 0.0, top_p: 1.0, seed: 0 }, keep).unwrap();
        assert_eq!(generated, expected, "{}", architecture.name());
    }
}

#[test]
fn a_prompt_longer_than_the_context_is_read_from_its_end() {
    let model = model(&llama());
    let first = |prompt: &[i64]| {
        let mut first = None;
        let keep = |token| {
            first = Some(token);
            ControlFlow::Break(())
        };
        model.generate(prompt, 1, Sampling { temperature: 1.0, top_p: 1.0, seed: 5 }, keep).unwrap();
        first
    };
    let long = text(2, 100);
    assert_eq!(first(&long), first(&long[92..]));
}

#[test]
fn a_document_behind_another_has_the_logits_that_it_has_alone() {
    for architecture in rich() {
        let model = model(&architecture);
        let (one, two) = (text(1, 30), [vec![END_OF_TEXT.into()], text(2, 40)].concat());
        let packed = logits_within_documents(&model, &[one.clone(), two.clone()].concat());
        let (first, second) = packed.split_at(one.len() * VOCABULARY);
        assert!(largest_difference(first, &model.logits(&one).unwrap()) < 1e-5);
        let alone = if let Architecture::Gpt2(_) = architecture {
            // Its positions count from the sequence's first token: another text of the same length.
            let packed = logits_within_documents(&model, &[text(5, 30), two.clone()].concat());
            packed[one.len() * VOCABULARY..].to_vec()
        } else {
            model.logits(&two).unwrap()
        };
        let difference = largest_difference(second, &alone);
        assert!(difference < 1e-5, "{}: {difference:e}", architecture.name());
        let through = model.logits(&[one.clone(), two].concat()).unwrap();
        let through = largest_difference(second, &through[one.len() * VOCABULARY..]);
        assert!(through > 1e-2, "{}: without the mask it differs, by {through:e}", architecture.name());
    }
}

#[test]
fn the_loss_of_documents_apart_is_the_sum_of_their_losses() {
    for architecture in [&rich()[0], &rich()[2]] {
        let apart = model(architecture).with_documents_apart(END_OF_TEXT);
        let sum = |windows: &[&[i64]]| {
            apart.evaluate(windows.iter().map(|window| window.to_vec()), 4, &go_on).unwrap()
        };
        let end = &[i64::from(END_OF_TEXT)][..];
        let packed = [&text(1, 20), end, &text(2, 30), end, &text(3, 10)].concat();
        let whole = sum(&[&packed]);
        // Every token is predicted once: an end of text by its document, what follows by it alone.
        let parts = sum(&[&packed[..21], &packed[20..52], &packed[51..]]);
        assert_eq!(whole.tokens, parts.tokens);
        assert!((whole.loss_sum / parts.loss_sum - 1.0).abs() < 1e-6, "{whole:?} {parts:?}");
        let through = model(architecture).evaluate([packed], 4, &go_on).unwrap();
        assert!((through.loss_sum / whole.loss_sum - 1.0).abs() > 1e-3, "{through:?} {whole:?}");
    }
}

#[test]
fn the_specification_decides_whether_a_trainer_keeps_documents_apart() {
    let mut tokens = batch(1);
    tokens[4] = END_OF_TEXT.into();
    let windows: Vec<Vec<i64>> = tokens.chunks(9).map(<[i64]>::to_vec).collect();
    for architecture in rich() {
        let mut losses = [true, false].map(|document_mask| {
            let mut trainer = trainer(&architecture, &TrainingSpec { document_mask, ..training() });
            let measured = trainer.evaluate(windows.clone(), &go_on).unwrap().loss();
            trainer.step(&tokens, 0, &go_on).unwrap();
            let trained = take_loss(&mut trainer);
            assert!((trained / measured - 1.0).abs() < 1e-5, "{trained} {measured}");
            trained
        });
        losses.sort_by(f64::total_cmp);
        assert!(losses[1] / losses[0] > 1.0 + 1e-5, "{}: {losses:?}", architecture.name());
    }
}

#[test]
fn a_model_loaded_piece_by_piece_is_the_whole_one_and_needs_no_gradient() {
    let architecture = gpt2();
    let flat = architecture.manifest().initialise(7);
    let loaded = LanguageModel::load(&architecture, test_device(), |start, piece: &mut [f32]| {
        let start = start as usize;
        piece.copy_from_slice(&flat[start..start + piece.len()]);
        Ok::<_, TrainerError>(())
    });
    let loaded = loaded.unwrap();
    assert_eq!(loaded.logits(&text(1, 9)).unwrap(), model(&architecture).logits(&text(1, 9)).unwrap());
    assert!(!loaded.model.output().requires_grad());
    let failed =
        LanguageModel::load(&architecture, test_device(), |_, _| Err(TrainerError::Cancelled)).err().unwrap();
    assert!(matches!(failed, TrainerError::Cancelled));
}
